"""Speed, measured: each script prints a table and, with ``--json``, writes its conditions too."""
