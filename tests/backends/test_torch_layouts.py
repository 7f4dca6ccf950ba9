"""PyTorch's tensors of other layouts: sparse, MKLDNN, nested and masked ones."""

from __future__ import annotations

import pytest
from libraries import LIBRARIES
from table import each_row

torch = pytest.importorskip("torch")

LIBRARY = LIBRARIES["torch"]

LAYOUTS = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "torch.sparse_csc": lambda x: x.to_sparse_csc(),
    "torch.sparse_bsr": lambda x: x.to_sparse_bsr((2, 1)),
    "torch.sparse_bsc": lambda x: x.to_sparse_bsc((2, 1)),
    "torch._mkldnn": lambda x: x.to_mkldnn(),
    "MaskedTensor": lambda x: torch.masked.masked_tensor(x, x > -9),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "nested, jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|MaskedTensor|nested tensors):UserWarning")
@each_row
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_refused_with_the_method_that_converts(name, row):
    """Before anything runs, in every place; and with that method it works."""
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    other = LAYOUTS[name](x)
    y, pullback = row.call_vjp(LIBRARY, x)
    layer = row.make_layer(LIBRARY, 2)
    layer.forward(x)
    dy = torch.ones_like(y)
    message = name.partition(",")[0].replace(".", r"\.")
    for start, call in (
        (f"{row.name}: x", lambda x: row.call(LIBRARY, x)),
        (f"{row.vjp}: x", lambda x: row.call_vjp(LIBRARY, x)),
        ("pullback: dy", lambda dy: pullback(dy)),
        ("forward: x", lambda x: layer.forward(x)),
        ("forward: x", lambda x: layer.forward(x, training=False)),
        ("backward: dy", lambda dy: layer.backward(dy)),
    ):
        with pytest.raises(TypeError, match=f"^{start} .*{message}.* method .*$") as caught:
            call(other)
        method = str(caught.value).rpartition(" method ")[2]
        dense = eval(f"other.{method}", {"other": other})
        if "dy" in start and row.name == "crelu":
            dense = torch.cat([dense, dense], 1)
        call(dense)
    with pytest.raises(TypeError, match=f"^{row.name}: out .*{message}.*; give an array like"):
        row.call(LIBRARY, x, out=other)
    assert dy.shape == y.shape
