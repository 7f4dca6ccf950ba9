"""How kernels are called, and by which threads, as LLVM IR.

A caller and its helpers meet at a board, an array of 64-bit words. Words that several threads
write lie on lines of their own.
"""

from __future__ import annotations

import platform

__all__ = ["BOARD", "FIELDS", "FLAGS", "KEEP_ORDER", "MACHINES", "RECORD", "THREAD_BYTES", "source"]

_LINE = 64  # bytes

_WORDS = _LINE // 8  # of a line

# Words that are read, and those that only a caller writes before it opens a job.
_READ = (
    "save_thread",  # addresses of functions of Python's and NumPy's C API, and the system's
    "restore_thread",
    "as_ssize_t",
    "incref",
    "acquire_lock",
    "release_lock",
    "new_like",
    "give_way",
    "get_cpu",  # of Linux, 0 elsewhere
    "get_affinity",
    "set_affinity",
    "none",  # addresses of objects: None, True, False ...
    "true",
    "false",
    "array",  # ... and classes: numpy.ndarray, numpy.memmap
    "memmap",
    "release_bytes",  # of `out`, from which on the GIL is released ...
    "threaded_bytes",  # ... several threads are used ...
    "stream_bytes",  # ... and stores go past the caches
    "patience",  # looks at `published` before a helper goes to sleep
    "threads",
    "kernel",  # the job: the arguments of its kernel, and the elements of a block
    "constants",
    "out",
    "in",
    "other",
    "size",
    "block",
    "cpu",  # the caller's
    "float_modes",  # the caller's: how its processor rounds, and whether it keeps subnormals
)
# Words that several threads write, each on a line of its own.
_WRITTEN = (
    "busy",  # 1 while a caller owns the board
    "published",  # jobs so far
    "open",  # 1 while helpers may begin
    "active",  # helpers within `take`
    "stop",
    "taken",  # and on, for every thread: blocks taken of its share ...
    "asleep",  # ... and, a helper's, whether it sleeps, and the lock that it then waits for
)

# Where on the board which word lies.
BOARD = {name: place for place, name in enumerate(_READ)}
BOARD |= {name: _WORDS * line for line, name in enumerate(_WRITTEN, -(-len(_READ) // _WORDS))}
BOARD["bell"] = BOARD["asleep"] + 1
THREAD_BYTES = 2 * _LINE  # from one thread's words to the next one's

_BLOCK_STEP = 4096  # elements; a block is a multiple, so that the mask begins at a byte
_BLOCK_MOST = 1 << 17  # less than a whole share only where the caches do not hold that anyway
# Looks, each some 50 ns, after which a waiting thread lets another have its CPU: it may be the one
# that it waits for.
_GIVE_WAY = 16
_CPU_SET = 128  # bytes of a cpu_set_t
_C_CONTIGUOUS, _F_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x2, 0x100, 0x400  # NumPy's flags
KEEP_ORDER = 2  # NPY_KEEPORDER
FLAGS = _C_CONTIGUOUS | _F_CONTIGUOUS | _ALIGNED | _WRITEABLE  # all that is read

# Where the fields of an array lie behind its header, whose last word is its class: C struct
# PyArrayObject_fields, part of NumPy's ABI, of which `strides` and `base` are not read.
FIELDS = {"class": -8, "data": 0, "axes": 8, "shape": 16, "dtype": 40, "flags": 48}

_X86 = ("x86_64", "amd64")

# How a processor is told that it waits for another.
_PAUSE = dict.fromkeys(_X86, ("llvm.x86.sse2.pause", "", "")) | dict.fromkeys(
    ("aarch64", "arm64"), ("llvm.aarch64.hint", "i32", "i32 1")
)

MACHINES = tuple(_PAUSE)  # those that this has been thought through for

# A record is what `call` is told of one kernel of one activation; its constants follow.
RECORD = {"plain": 0, "stream": 1, "itemsize": 2, "constants": 3}


def source(header: int) -> str:
    """Return the module that calls kernels: the functions that Python calls (METH_FASTCALL).

    ``call(record, size, out, in[, other])`` runs a kernel over whole arrays and returns `out`, or
    if that is None a fresh array like `in` (which costs a third of `numpy.empty_like` here). It
    returns None and has done nothing where there is no kernel, an array's elements are not in one
    piece and order, or something else than an array is given, as whatever it claims to be.

    ``fits(out, like, other, bytes)`` tells of three arrays, the first two of one class, whether
    `out` surely may take a result: it has the shape of `like`, all have one dtype and are in one
    piece in C order, and so many bytes of `out` may be written, and are none or all of another's.

    ``help(number)`` takes part in jobs as thread `number`, without the GIL, until it is to stop.
    Between two jobs it looks for the next one for a while, since to be woken takes longer than most
    jobs; then it sleeps. ``ring()`` wakes all who sleep.

    A helper that finds itself on the caller's CPU goes to another: where Linux puts a thread that
    is woken it stays for many jobs, which on one CPU take longer than without help.

    For a job each thread has a share of the blocks, so that what its cache holds it meets again,
    and then helps with the others' shares. There is one job at a time: who finds the board busy
    works alone, since the CPUs are busy as well. On x86 a helper's processor rounds, and takes
    subnormals for zero or not, as the caller's does.

    Parameters
    ----------
    header : int
        Bytes of a Python object's header, after which come an array's `FIELDS`.
    """

    def load(name: str, base: str, offset: int, kind: str = "i64") -> str:
        return f"""\
  %{name}_at = getelementptr i8, ptr %{base}, i64 {offset}
  %{name} = load {kind}, ptr %{name}_at"""

    def field(name: str, array: str, of: str, kind: str = "ptr") -> str:
        return load(name, array, header + FIELDS[of], kind)

    def data(name: str, owner: str) -> str:
        return field(name, owner, "data")

    def flags(name: str, owner: str) -> str:
        return field(name, owner, "flags", "i32")

    def board(name: str, kind: str = "i64") -> str:
        return load(name, "board", 8 * BOARD[name], kind)

    def is_array(name: str, *objects: str) -> str:
        """Tell whether all objects are of the classes whose memory is known."""
        lines, together = [board("array", "ptr"), board("memmap", "ptr")], "true"
        for number, found in enumerate(objects):
            kind = f"class_{number}"
            lines.append(f"""\
{field(kind, found, "class")}
  %{kind}_array = icmp eq ptr %{kind}, %array
  %{kind}_memmap = icmp eq ptr %{kind}, %memmap
  %{kind}_known = or i1 %{kind}_array, %{kind}_memmap
  %{kind}_all = and i1 {together}, %{kind}_known""")
            together = f"%{kind}_all"
        return "\n".join([*lines, f"  %{name} = and i1 true, {together}"])

    def word(name: str) -> str:
        return f"%{name}_at = getelementptr i8, ptr %board, i64 {8 * BOARD[name]}"

    def record(name: str, kind: str) -> str:
        return load(name, "record", 8 * RECORD[name], kind)

    def post(name: str, kind: str, value: str) -> str:
        return f"""\
  %post_{name} = getelementptr i8, ptr %board, i64 {8 * BOARD[name]}
  store {kind} {value}, ptr %post_{name}"""

    machine = platform.machine().lower()
    hint, parameter, argument = _PAUSE[machine]
    if machine in _X86:
        store, load_modes = (f"call void @llvm.x86.sse.{name}mxcsr(ptr" for name in ("st", "ld"))
        post_modes = f"{store} %float_modes_at)"
        take_modes = f"{store} %own_modes)\n  {load_modes} %float_modes_at)"
        leave_modes = f"{load_modes} %own_modes)"
        declare_modes = "\n".join(
            f"declare void @llvm.x86.sse.{name}mxcsr(ptr)" for name in ("st", "ld")
        )
    else:
        post_modes = take_modes = leave_modes = declare_modes = ""
    arguments = "ptr %constants, ptr %out, ptr %in, ptr %other"

    return f"""
define ptr @call(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{load("record_array", "args", 0, "ptr")}
{load("size_object", "args", 8, "ptr")}
{load("out_given", "args", 16, "ptr")}
{load("in_array", "args", 24, "ptr")}
  %four = icmp ult i64 %count, 5
  %last = select i1 %four, i64 24, i64 32
  %other_array_at = getelementptr i8, ptr %args, i64 %last
  %other_array = load ptr, ptr %other_array_at
{data("record", "record_array")}
{record("plain", "ptr")}
{board("none", "ptr")}
{board("incref", "ptr")}
  %fresh = icmp eq ptr %out_given, %none
  %like_out = select i1 %fresh, ptr %in_array, ptr %out_given
{is_array("arrays", "like_out", "in_array", "other_array")}
  br i1 %arrays, label %look, label %refuse
look:
{flags("out_flags", "like_out")}
{flags("in_flags", "in_array")}
{flags("other_flags", "other_array")}
  %two_flags = and i32 %out_flags, %in_flags
  %all_flags = and i32 %two_flags, %other_flags
  %c = and i32 %all_flags, {_C_CONTIGUOUS | _ALIGNED}
  %f = and i32 %all_flags, {_F_CONTIGUOUS | _ALIGNED}
  %in_c = icmp eq i32 %c, {_C_CONTIGUOUS | _ALIGNED}
  %in_f = icmp eq i32 %f, {_F_CONTIGUOUS | _ALIGNED}
  %in_order = or i1 %in_c, %in_f
  %ready = icmp ne ptr %plain, null
  %can = and i1 %in_order, %ready
  br i1 %can, label %get_out, label %refuse
refuse:
  call void %incref(ptr %none)
  ret ptr %none
get_out:
  br i1 %fresh, label %allocate, label %take_given
take_given:
  call void %incref(ptr %out_given)
  br label %begin
allocate:
{board("new_like", "ptr")}
  %out_new = call ptr %new_like(ptr %in_array, i32 {KEEP_ORDER}, ptr null, i32 0)
  %failed = icmp eq ptr %out_new, null
  br i1 %failed, label %no_memory, label %begin
no_memory:
  ret ptr null
begin:
  %out_array = phi ptr [%out_given, %take_given], [%out_new, %allocate]
{board("as_ssize_t", "ptr")}
  %size = call i64 %as_ssize_t(ptr %size_object)
{data("out", "out_array")}
{data("in", "in_array")}
{data("other", "other_array")}
  %constants = getelementptr i8, ptr %record, i64 {8 * RECORD["constants"]}
{record("itemsize", "i64")}
  %bytes = mul i64 %size, %itemsize
{board("release_bytes")}
  %long = icmp uge i64 %bytes, %release_bytes
  br i1 %long, label %release, label %short
short:
  call void %plain({arguments}, i64 0, i64 %size)
  br label %end
release:
{board("save_thread", "ptr")}
  %state = call ptr %save_thread()
{record("stream", "ptr")}
{board("stream_bytes")}
  %beyond_cache = icmp uge i64 %bytes, %stream_bytes
  %out_is_in = icmp eq ptr %out, %in
  %out_is_other = icmp eq ptr %out, %other
  %in_place = or i1 %out_is_in, %out_is_other
  %apart = xor i1 %in_place, true
  %streams = and i1 %beyond_cache, %apart
  %kernel = select i1 %streams, ptr %stream, ptr %plain
{board("threads")}
  %several = icmp ugt i64 %threads, 1
{board("threaded_bytes")}
  %worth = icmp uge i64 %bytes, %threaded_bytes
  %shared = and i1 %several, %worth
  br i1 %shared, label %claim, label %alone
alone:
  call void %kernel({arguments}, i64 0, i64 %size)
  br label %acquire
claim:
  {word("busy")}
  %claimed = cmpxchg ptr %busy_at, i64 0, i64 1 seq_cst seq_cst
  %free = extractvalue {{ i64, i1 }} %claimed, 1
  br i1 %free, label %publish, label %alone
publish:
{post("kernel", "ptr", "%kernel")}
{post("constants", "ptr", "%constants")}
{post("out", "ptr", "%out")}
{post("in", "ptr", "%in")}
{post("other", "ptr", "%other")}
{post("size", "i64", "%size")}
  %part = udiv i64 %size, %threads
  %more = add i64 %part, {_BLOCK_STEP}
  %rounded = and i64 %more, {-_BLOCK_STEP}
  %block = call i64 @llvm.umin.i64(i64 %rounded, i64 {_BLOCK_MOST})
{post("block", "i64", "%block")}
  {word("float_modes")}
  {post_modes}
{board("get_cpu", "ptr")}
  %cpu_known = icmp ne ptr %get_cpu, null
  br i1 %cpu_known, label %tell_cpu, label %prepare
tell_cpu:
  %cpu = call i32 %get_cpu()
  %cpu_wide = sext i32 %cpu to i64
  {word("cpu")}
  store atomic i64 %cpu_wide, ptr %cpu_at monotonic, align 8
  br label %prepare
prepare:
  {word("taken")}
  br label %clear
clear:
  %thread = phi i64 [0, %prepare], [%thread_next, %clear]
  %offset = mul i64 %thread, {THREAD_BYTES}
  %count_at = getelementptr i8, ptr %taken_at, i64 %offset
  store i64 0, ptr %count_at
  %thread_next = add i64 %thread, 1
  %cleared = icmp eq i64 %thread_next, %threads
  br i1 %cleared, label %open, label %clear
open:
  {word("open")}
  store atomic i64 1, ptr %open_at seq_cst, align 8
  {word("published")}
  %before = atomicrmw add ptr %published_at, i64 1 seq_cst
  call void @wake(ptr %board)
  call void @take(ptr %board, i64 0)
  store atomic i64 0, ptr %open_at seq_cst, align 8
  {word("active")}
{board("give_way", "ptr")}
  br label %wait
wait:
  %waits = phi i64 [0, %open], [%waits_next, %waited]
  %active = load atomic i64, ptr %active_at seq_cst, align 8
  %alone_again = icmp eq i64 %active, 0
  br i1 %alone_again, label %leave, label %pause
pause:
  call void @{hint}({argument})
  %waits_next = add i64 %waits, 1
  %waits_part = and i64 %waits_next, {_GIVE_WAY - 1}
  %waits_long = icmp eq i64 %waits_part, 0
  br i1 %waits_long, label %polite, label %waited
polite:
  %yielded = call i32 %give_way()
  br label %waited
waited:
  br label %wait
leave:
  store atomic i64 0, ptr %busy_at seq_cst, align 8
  br label %acquire
acquire:
{board("restore_thread", "ptr")}
  call void %restore_thread(ptr %state)
  br label %end
end:
  ret ptr %out_array
}}

define ptr @fits(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{board("incref", "ptr")}
{board("true", "ptr")}
{board("false", "ptr")}
{board("as_ssize_t", "ptr")}
{load("out_array", "args", 0, "ptr")}
{load("like_array", "args", 8, "ptr")}
{load("other_array", "args", 16, "ptr")}
{load("bytes_object", "args", 24, "ptr")}
{is_array("arrays", "out_array", "like_array", "other_array")}
  br i1 %arrays, label %look, label %no
look:
  %bytes = call i64 %as_ssize_t(ptr %bytes_object)
{field("out_type", "out_array", "dtype")}
{field("like_type", "like_array", "dtype")}
{field("other_type", "other_array", "dtype")}
  %out_type_same = icmp eq ptr %out_type, %like_type
  %other_type_same = icmp eq ptr %other_type, %like_type
{flags("out_flags", "out_array")}
{flags("like_flags", "like_array")}
{flags("other_flags", "other_array")}
  %two_flags = and i32 %like_flags, %other_flags
  %not_written = or i32 %two_flags, {_WRITEABLE}
  %all_flags = and i32 %out_flags, %not_written
  %needed = and i32 %all_flags, {_C_CONTIGUOUS | _ALIGNED | _WRITEABLE}
  %flags_right = icmp eq i32 %needed, {_C_CONTIGUOUS | _ALIGNED | _WRITEABLE}
{field("out_axes", "out_array", "axes", "i32")}
{field("like_axes", "like_array", "axes", "i32")}
  %axes_same = icmp eq i32 %out_axes, %like_axes
{data("out", "out_array")}
{data("like", "like_array")}
{data("other", "other_array")}
  %out_end = getelementptr i8, ptr %out, i64 %bytes
  %like_end = getelementptr i8, ptr %like, i64 %bytes
  %other_end = getelementptr i8, ptr %other, i64 %bytes
  %like_is = icmp eq ptr %out, %like
  %like_before = icmp ule ptr %like_end, %out
  %like_behind = icmp ule ptr %out_end, %like
  %like_apart = or i1 %like_before, %like_behind
  %like_right = or i1 %like_is, %like_apart
  %other_is = icmp eq ptr %out, %other
  %other_before = icmp ule ptr %other_end, %out
  %other_behind = icmp ule ptr %out_end, %other
  %other_apart = or i1 %other_before, %other_behind
  %other_right = or i1 %other_is, %other_apart
  %types_right = and i1 %out_type_same, %other_type_same
  %memory_right = and i1 %like_right, %other_right
  %kinds_right = and i1 %types_right, %flags_right
  %right_but_axes = and i1 %kinds_right, %memory_right
  %right_but_shape = and i1 %right_but_axes, %axes_same
{field("out_shape", "out_array", "shape")}
{field("like_shape", "like_array", "shape")}
  %axes = zext i32 %out_axes to i64
  br i1 %right_but_shape, label %test, label %no
test:
  %axis = phi i64 [0, %look], [%next, %compare]
  %some = icmp ult i64 %axis, %axes
  br i1 %some, label %compare, label %yes
compare:
  %out_length_at = getelementptr i64, ptr %out_shape, i64 %axis
  %like_length_at = getelementptr i64, ptr %like_shape, i64 %axis
  %out_length = load i64, ptr %out_length_at
  %like_length = load i64, ptr %like_length_at
  %length_same = icmp eq i64 %out_length, %like_length
  %next = add i64 %axis, 1
  br i1 %length_same, label %test, label %no
yes:
  call void %incref(ptr %true)
  ret ptr %true
no:
  call void %incref(ptr %false)
  ret ptr %false
}}

define ptr @help(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
{data("board", "self")}
{board("as_ssize_t", "ptr")}
{board("none", "ptr")}
{board("incref", "ptr")}
{board("save_thread", "ptr")}
{board("restore_thread", "ptr")}
{board("patience")}
{load("number_object", "args", 0, "ptr")}
  %number = call i64 %as_ssize_t(ptr %number_object)
  {word("taken")}
  %offset = mul i64 %number, {THREAD_BYTES}
  %mine_at = getelementptr i8, ptr %taken_at, i64 %offset
  %asleep_at = getelementptr i8, ptr %mine_at, i64 {_LINE}
  %bell_at = getelementptr i8, ptr %mine_at, i64 {_LINE + 8}
  %bell = load ptr, ptr %bell_at
{board("acquire_lock", "ptr")}
{board("give_way", "ptr")}
  {word("published")}
  {word("open")}
  {word("active")}
  {word("stop")}
  %state = call ptr %save_thread()
  %jobs = load atomic i64, ptr %published_at seq_cst, align 8
  %last_but_one = sub i64 %jobs, 1
  br label %watch
watch:
  %seen = phi i64 [%last_but_one, %entry], [%now, %leave], [%now, %again]
  br label %look
look:
  %looks = phi i64 [0, %watch], [%next, %stay], [%next, %polite]
  %now = load atomic i64, ptr %published_at seq_cst, align 8
  %news = icmp ne i64 %now, %seen
  br i1 %news, label %join, label %idle
idle:
  call void @{hint}({argument})
  %next = add i64 %looks, 1
  %tired = icmp ugt i64 %next, %patience
  %stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %stopped = icmp ne i64 %stop, 0
  %done = or i1 %tired, %stopped
  br i1 %done, label %rest, label %stay
stay:
  %part = and i64 %next, {_GIVE_WAY - 1}
  %long = icmp eq i64 %part, 0
  br i1 %long, label %polite, label %look
polite:
  call void @step_aside(ptr %board)
  %yielded = call i32 %give_way()
  br label %look
rest:
  br i1 %stopped, label %return, label %lie_down
lie_down:
  store atomic i64 1, ptr %asleep_at seq_cst, align 8
  %latest = load atomic i64, ptr %published_at seq_cst, align 8
  %late_stop = load atomic i64, ptr %stop_at seq_cst, align 8
  %missed = icmp ne i64 %latest, %seen
  %missed_stop = icmp ne i64 %late_stop, 0
  %no_sleep = or i1 %missed, %missed_stop
  br i1 %no_sleep, label %get_up, label %sleep
get_up:
  %was_asleep = atomicrmw xchg ptr %asleep_at, i64 0 seq_cst
  %not_woken = icmp eq i64 %was_asleep, 1
  br i1 %not_woken, label %again, label %sleep
sleep:
  %locked = call i32 %acquire_lock(ptr %bell, i32 1)
  br label %again
again:
  br label %watch
join:
  %before = atomicrmw add ptr %active_at, i64 1 seq_cst
  %open = load atomic i64, ptr %open_at seq_cst, align 8
  %is_open = icmp ne i64 %open, 0
  br i1 %is_open, label %work, label %leave
work:
  call void @step_aside(ptr %board)
  call void @take_as_caller(ptr %board, i64 %number)
  br label %leave
leave:
  %after = atomicrmw sub ptr %active_at, i64 1 seq_cst
  br label %watch
return:
  call void %restore_thread(ptr %state)
  call void %incref(ptr %none)
  ret ptr %none
}}

define ptr @ring(ptr %self, ptr %args, i64 %count) nounwind {{
entry:
  fence seq_cst  ; what Python has stored, `stop` say, comes before the look at who sleeps
{data("board", "self")}
{board("none", "ptr")}
{board("incref", "ptr")}
  call void @wake(ptr %board)
  call void %incref(ptr %none)
  ret ptr %none
}}

define internal void @wake(ptr %board) nounwind {{
entry:
{board("threads")}
{board("release_lock", "ptr")}
  {word("taken")}
  br label %test
test:
  %number = phi i64 [1, %entry], [%next, %skip]
  %some = icmp ult i64 %number, %threads
  br i1 %some, label %look, label %done
look:
  %offset = mul i64 %number, {THREAD_BYTES}
  %its_at = getelementptr i8, ptr %taken_at, i64 %offset
  %asleep_at = getelementptr i8, ptr %its_at, i64 {_LINE}
  %bell_at = getelementptr i8, ptr %its_at, i64 {_LINE + 8}
  %asleep = load atomic i64, ptr %asleep_at seq_cst, align 8
  %is_asleep = icmp eq i64 %asleep, 1
  br i1 %is_asleep, label %claim, label %skip
claim:
  %was_asleep = atomicrmw xchg ptr %asleep_at, i64 0 seq_cst
  %mine = icmp eq i64 %was_asleep, 1
  br i1 %mine, label %release, label %skip
release:
  %bell = load ptr, ptr %bell_at
  call void %release_lock(ptr %bell)
  br label %skip
skip:
  %next = add i64 %number, 1
  br label %test
done:
  ret void
}}

define internal void @step_aside(ptr %board) nounwind {{
entry:
  {word("cpu")}
  %cpu = load atomic i64, ptr %cpu_at monotonic, align 8
{board("get_cpu", "ptr")}
  %known = icmp ne ptr %get_cpu, null
  br i1 %known, label %look, label %done
look:
  %own = call i32 %get_cpu()
  %own_cpu = sext i32 %own to i64
  %same = icmp eq i64 %own_cpu, %cpu
  %counted = icmp ult i64 %cpu, {8 * _CPU_SET}
  %crowded = and i1 %same, %counted
  br i1 %crowded, label %move, label %done
move:
{board("get_affinity", "ptr")}
{board("set_affinity", "ptr")}
  %all = alloca [{_CPU_SET} x i8], align 8
  %others = alloca [{_CPU_SET} x i8], align 8
  %error = call i32 %get_affinity(i32 0, i64 {_CPU_SET}, ptr %all)
  %failed = icmp slt i32 %error, 0
  br i1 %failed, label %done, label %go
go:
  %set = load <{_CPU_SET // 8} x i64>, ptr %all, align 8
  store <{_CPU_SET // 8} x i64> %set, ptr %others, align 8
  %byte = lshr i64 %cpu, 3
  %byte_at = getelementptr i8, ptr %others, i64 %byte
  %eight = load i8, ptr %byte_at
  %bit = and i64 %cpu, 7
  %shift = trunc i64 %bit to i8
  %one = shl i8 1, %shift
  %without = xor i8 %one, -1
  %seven = and i8 %eight, %without
  store i8 %seven, ptr %byte_at
  %away = call i32 %set_affinity(i32 0, i64 {_CPU_SET}, ptr %others)
  %back = call i32 %set_affinity(i32 0, i64 {_CPU_SET}, ptr %all)
  br label %done
done:
  ret void
}}

define internal void @take_as_caller(ptr %board, i64 %number) nounwind {{
entry:
  {word("float_modes")}
  %own_modes = alloca i32
  {take_modes}
  call void @take(ptr %board, i64 %number)
  {leave_modes}
  ret void
}}

define internal void @take(ptr %board, i64 %number) nounwind {{
entry:
{board("kernel", "ptr")}
{board("constants", "ptr")}
{board("out", "ptr")}
{board("in", "ptr")}
{board("other", "ptr")}
{board("size")}
{board("block")}
{board("threads")}
  {word("taken")}
  %size_less_one = sub i64 %size, 1
  %last_block = udiv i64 %size_less_one, %block
  %last_of_share = udiv i64 %last_block, %threads
  %share = add i64 %last_of_share, 1
  br label %next_share
next_share:
  %step = phi i64 [0, %entry], [%step_next, %exhausted]
  %all_done = icmp eq i64 %step, %threads
  br i1 %all_done, label %done, label %a_share
a_share:
  %sum = add i64 %number, %step
  %whose = urem i64 %sum, %threads
  %offset = mul i64 %whose, {THREAD_BYTES}
  %count_at = getelementptr i8, ptr %taken_at, i64 %offset
  %base = mul i64 %whose, %share
  br label %next_block
next_block:
  %nth = atomicrmw add ptr %count_at, i64 1 seq_cst
  %index = add i64 %base, %nth
  %start = mul i64 %index, %block
  %of_share = icmp ult i64 %nth, %share
  %of_array = icmp ult i64 %start, %size
  %is_block = and i1 %of_share, %of_array
  br i1 %is_block, label %run, label %exhausted
run:
  %whole = add i64 %start, %block
  %stop = call i64 @llvm.umin.i64(i64 %whole, i64 %size)
  call void %kernel({arguments}, i64 %start, i64 %stop)
  br label %next_block
exhausted:
  %step_next = add i64 %step, 1
  br label %next_share
done:
  ret void
}}

declare void @{hint}({parameter})
{declare_modes}
declare i64 @llvm.umin.i64(i64, i64)
"""
