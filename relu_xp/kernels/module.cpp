// The Python module relu_xp.kernels._cpu: Python objects in, Python objects out. It checks what
// memory safety needs (types, dtypes, shapes, whether an output may be written), so that a wrong
// argument raises and never crashes; it allocates results and releases the GIL. Everything else
// that a caller may do wrong, and the messages about it, are the business of relu_xp.validation.
//
// No frame from which the GIL is released has a destructor or is noexcept: at exit CPython ends a
// thread that asks for the GIL by unwinding its stack.

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu_kernels.h"
#include "gradient_sums.h"
#include "prelu.h"
#include "strided.h"
#include "thread_pool.h"

namespace relu_xp {

const KernelTable* active_kernels = nullptr;

namespace {

static_assert(NPY_MAXDIMS == kMaxDims && std::is_same_v<npy_intp, std::ptrdiff_t>);
static_assert(std::is_trivially_destructible_v<Job> &&
              std::is_trivially_destructible_v<WeightGrad> &&
              std::is_trivially_destructible_v<BiasGrad>);

using Arguments = PyObject* const*;

PyTypeObject* mask_type = nullptr;  // relu_xp.mask.Mask, a tuple of two

// Bytes of a result from which on a call ...
struct Limits {
  std::atomic<Py_ssize_t> release{Py_ssize_t{1} << 15};  // releases the GIL
  std::atomic<Py_ssize_t> threads{Py_ssize_t{1} << 19};  // uses threads
  std::atomic<Py_ssize_t> stream{Py_ssize_t{1} << 25};   // writes past the caches: README.md
};
Limits limits;

constexpr std::size_t kStep = 4096;  // elements of the smallest part of a thread
// Elements that a thread takes at a time. A larger share does not stay in the caches from one call
// to the next, so that nothing is lost where another thread takes the rest of it.
constexpr std::size_t kPart = std::size_t{1} << 17;
constexpr int kMaxThreads = 1024;

constexpr Params kRelu[kFloatingDtypes] = {{0, 0, 0x3c00, 0, kFloat16, kPlain, 0, {}},
                                           {0, 0, 0x3f80, 0, kBFloat16, kPlain, 0, {}},
                                           {0, 0, 0x3f800000, 0, kFloat32, kPlain, 0, {}},
                                           {0, 0, 0x3ff0000000000000, 0, kFloat64, kPlain, 0, {}}};

// ---- Running a job ------------------------------------------------------------------------------

Kernel kernel_of(const Params& params, Operation operation) {
  return active_kernels->floating[params.dtype][operation][params.variant];
}

// Adds an operand to a job: the output first, then the inputs.
void add_operand(Job& job, PyArrayObject* array) {
  Operand& operand = job.operands[job.count++];
  operand.data = PyArray_BYTES(array);
  operand.size = static_cast<std::size_t>(PyArray_SIZE(array));
  operand.itemsize = static_cast<std::size_t>(PyArray_ITEMSIZE(array));
  operand.ndim = PyArray_NDIM(array);
  operand.array_shape = PyArray_DIMS(array);
  operand.array_strides = PyArray_STRIDES(array);
  const bool aligned = is_aligned(operand.data, operand.itemsize);
  operand.c_contiguous = aligned && PyArray_IS_C_CONTIGUOUS(array);
  operand.f_contiguous = aligned && PyArray_IS_F_CONTIGUOUS(array);
  operand.constant = false;
}

// Adds ones of a dtype.
void add_ones(Job& job, int dtype, std::size_t itemsize) {
  Operand& operand = job.operands[job.count++];
  operand.data = reinterpret_cast<char*>(const_cast<std::uint64_t*>(&kRelu[dtype].positive_slope));
  operand.size = 1;
  operand.itemsize = itemsize;
  operand.c_contiguous = operand.f_contiguous = false;
  operand.constant = true;
}

// Runs a task over [0, count): without the GIL and by several threads if the result is large.
void run_task(ThreadPool::Task task, void* context, std::size_t count, std::size_t step,
              std::size_t part, Py_ssize_t nbytes) {
  if (nbytes < limits.release) {
    task(context, 0, count);
    return;
  }
  PyThreadState* state = PyEval_SaveThread();
  ThreadPool* pool = nbytes >= limits.threads ? ThreadPool::instance() : nullptr;
  if (pool != nullptr) {
    pool->parallel_for(count, step, part, task, context);
  } else {
    task(context, 0, count);
  }
  PyEval_RestoreThread(state);
}

// Sets how a job accesses memory; returns the bytes of its output.
Py_ssize_t set_access(Job& job) {
  const auto nbytes = static_cast<Py_ssize_t>(job.size * job.operands[0].itemsize);
  bool in_place = false;
  for (int i = 1; i < job.count; ++i) in_place |= job.operands[i].data == job.operands[0].data;
  job.stream = nbytes >= limits.stream && !in_place;
  job.prefetch = nbytes >= limits.threads;
  return nbytes;
}

// Runs a job and returns its output.
PyObject* execute(Job& job, PyArrayObject* out, ThreadPool::Task task = run_job) {
  const Py_ssize_t nbytes = set_access(job);
  if (job.size > 0) run_task(task, &job, job.size, kStep, kPart, nbytes);
  return reinterpret_cast<PyObject*>(out);
}

// ---- Arguments ----------------------------------------------------------------------------------
//
// Functions return null or false with a Python error set where an argument is refused.

// The kernels' number of a dtype, or -1 if they do not have it.
int dtype_of(const PyArray_Descr* descr) {
  if (!PyArray_ISNBO(descr->byteorder)) return -1;
  const npy_intp size = PyDataType_ELSIZE(descr);
  switch (descr->kind) {
    case 'f':
      return size == 4 ? kFloat32 : size == 8 ? kFloat64 : size == 2 ? kFloat16 : -1;
    case 'V':  // ml_dtypes' class of two bytes; a record has NumPy's own number
      return size == 2 && PyTypeNum_ISUSERDEF(descr->type_num) ? kBFloat16 : -1;
    case 'i':
    case 'u':
      for (int width = 0; width < 4; ++width) {
        if (size == npy_intp{1} << width) return kInt8 + 2 * width + (descr->kind == 'u' ? 1 : 0);
      }
      return -1;
    default:
      return -1;
  }
}

int dtype_of(PyArrayObject* array) { return dtype_of(PyArray_DESCR(array)); }

constexpr int kAnyFloating = -1;

// The object as an array of a dtype.
PyArrayObject* parse_array(PyObject* object, const char* name, int dtype) {
  if (!PyArray_Check(object)) {
    PyErr_Format(PyExc_TypeError, "%s must be an ndarray, got %s", name, Py_TYPE(object)->tp_name);
    return nullptr;
  }
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  const int its_dtype = dtype_of(array);
  if (dtype == kAnyFloating ? its_dtype >= 0 && its_dtype < kFloatingDtypes : its_dtype == dtype) {
    return array;
  }
  PyErr_Format(PyExc_TypeError, "%s has an unsupported dtype, or another one than it must have",
               name);
  return nullptr;
}

const Params* parse_params(PyObject* object, int num_dtypes = kFloatingDtypes) {
  if (PyBytes_Check(object) && PyBytes_GET_SIZE(object) == sizeof(Params)) {
    const auto* params = reinterpret_cast<const Params*>(PyBytes_AS_STRING(object));
    if (params->dtype >= 0 && params->dtype < num_dtypes && params->variant >= 0 &&
        params->variant < kVariants) {
      return params;
    }
  }
  PyErr_SetString(PyExc_TypeError,
                  "the parameters must be CastParameters.record, of a floating dtype");
  return nullptr;
}

bool check_shape(PyArrayObject* array, PyArrayObject* like, const char* name) {
  if (PyArray_SAMESHAPE(array, like)) return true;
  PyErr_Format(PyExc_ValueError, "%s has another shape than the other arrays", name);
  return false;
}

bool check_broadcast(PyArrayObject* array, PyArrayObject* to) {
  bool valid = PyArray_NDIM(array) == PyArray_NDIM(to);
  for (int axis = 0; valid && axis < PyArray_NDIM(to); ++axis) {
    valid = PyArray_DIM(array, axis) == 1 || PyArray_DIM(array, axis) == PyArray_DIM(to, axis);
  }
  if (!valid) PyErr_SetString(PyExc_ValueError, "slopes do not broadcast to the other arrays");
  return valid;
}

// Whether elements share memory, as in a view that broadcasting has made: no layout for a result.
bool is_broadcast(PyArrayObject* array) {
  for (int axis = 0; axis < PyArray_NDIM(array); ++axis) {
    if (PyArray_STRIDE(array, axis) == 0 && PyArray_DIM(array, axis) > 1) return true;
  }
  return false;
}

// A fresh array in the layout of `like`; if that is a broadcast view, in C order after the
// permutation of its axes, if there is one.
PyObject* new_like(PyArrayObject* like, PyArray_Descr* descr, const int* axes) {
  Py_INCREF(descr);
  const int ndim = PyArray_NDIM(like);
  npy_intp* shape = PyArray_DIMS(like);
  npy_intp permuted[NPY_MAXDIMS];
  npy_intp* strides = nullptr;
  if (!PyArray_IS_C_CONTIGUOUS(like)) {
    if (!is_broadcast(like)) return PyArray_NewLikeArray(like, NPY_KEEPORDER, descr, 0);
    if (axes != nullptr) {
      strides = permuted;
      npy_intp stride = PyDataType_ELSIZE(descr);
      for (int i = ndim - 1; i >= 0; --i) {
        strides[axes[i]] = stride;
        stride *= shape[axes[i]];
      }
    }
  }
  return PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, strides, nullptr, 0, nullptr);
}

// A new reference to an output of the shape of `like`: the object if it is an array that may be
// written, or if it is None a fresh one, see `new_like`.
PyArrayObject* parse_out(PyObject* object, PyArrayObject* like, PyArray_Descr* descr,
                         const int* axes = nullptr) {
  if (object == Py_None) return reinterpret_cast<PyArrayObject*>(new_like(like, descr, axes));
  PyArrayObject* out = parse_array(object, "out", dtype_of(descr));
  if (out == nullptr || !check_shape(out, like, "out")) return nullptr;
  if (!PyArray_ISWRITEABLE(out)) {
    PyErr_SetString(PyExc_ValueError, "out is read-only");
    return nullptr;
  }
  Py_INCREF(out);
  return out;
}

npy_intp mask_nbytes(const Params& params, npy_intp size) {
  return params.three_branches != 0 ? size : (size + 7) / 8;
}

// A contiguous array that holds the mask of `size` elements.
PyArrayObject* parse_mask(PyObject* object, const Params& params, npy_intp size) {
  PyArrayObject* mask = parse_array(object, "mask", kUInt8);
  if (mask == nullptr) return nullptr;
  if (PyArray_NDIM(mask) != 1 || !PyArray_IS_C_CONTIGUOUS(mask) ||
      PyArray_DIM(mask, 0) < mask_nbytes(params, size)) {
    PyErr_SetString(PyExc_ValueError, "mask must be 1-D, contiguous and large enough");
    return nullptr;
  }
  return mask;
}

// Writes a permutation of the axes of `array`; returns false if the object is none.
bool parse_axes(PyObject* object, PyArrayObject* array, int* axes) {
  const int ndim = PyArray_NDIM(array);
  bool valid = PyTuple_Check(object) && PyTuple_GET_SIZE(object) == ndim;
  bool seen[NPY_MAXDIMS] = {};
  for (int i = 0; valid && i < ndim; ++i) {
    PyObject* item = PyTuple_GET_ITEM(object, i);
    const long axis = PyLong_Check(item) ? PyLong_AsLong(item) : -1;
    valid = axis >= 0 && axis < ndim && !seen[axis];
    if (!valid) break;
    axes[i] = static_cast<int>(axis);
    seen[axis] = true;
  }
  if (!valid && PyErr_Occurred() == nullptr) {
    PyErr_SetString(PyExc_ValueError, "axes must be None or a permutation of the array's axes");
  }
  return valid;
}

// An axis of `array`, or -1 if the object is none.
int parse_axis(PyObject* object, PyArrayObject* array) {
  const long axis = PyLong_Check(object) ? PyLong_AsLong(object) : -1;
  if (axis >= 0 && axis < PyArray_NDIM(array)) return static_cast<int>(axis);
  if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_ValueError, "there is no such axis");
  return -1;
}

// A new reference to a contiguous bias along an axis of `x`.
PyArrayObject* parse_bias(PyObject* object, PyArrayObject* x, int axis) {
  PyArrayObject* bias = parse_array(object, "bias", dtype_of(x));
  if (bias == nullptr) return nullptr;
  if (PyArray_NDIM(bias) != 1 || PyArray_DIM(bias, 0) != PyArray_DIM(x, axis)) {
    PyErr_SetString(PyExc_ValueError, "bias must be 1-D and as long as the axis of x");
    return nullptr;
  }
  return reinterpret_cast<PyArrayObject*>(
      PyArray_FromArray(bias, nullptr, NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED));
}

// The bias of a job whose elements are in the order of `axes`.
Bias bias_of(PyArrayObject* bias, PyArrayObject* x, int axis, const int* axes) {
  Bias result;
  result.data = PyArray_BYTES(bias);
  result.channels = static_cast<std::size_t>(PyArray_DIM(x, axis));
  for (int i = PyArray_NDIM(x) - 1; i >= 0; --i) {
    const int behind = axes == nullptr ? i : axes[i];
    if (behind == axis) break;
    result.run *= static_cast<std::size_t>(PyArray_DIM(x, behind));
  }
  return result;
}

// ---- The four passes ----------------------------------------------------------------------------

// forward(params, x, out), for any dtype
PyObject* forward(Arguments args) {
  const Params* params = parse_params(args[0], kDtypes);
  PyArrayObject* x = params == nullptr ? nullptr : parse_array(args[1], "x", params->dtype);
  PyArrayObject* out = x == nullptr ? nullptr : parse_out(args[2], x, PyArray_DESCR(x));
  if (out == nullptr) return nullptr;
  Job job;
  job.kernel = params->dtype < kFloatingDtypes ? kernel_of(*params, kForward)
                                               : active_kernels->integer[params->dtype - kInt8];
  job.params = params;
  add_operand(job, out);
  add_operand(job, x);
  lay_out(job);
  return execute(job, out);
}

// bias_relu(params, x, bias, axis, out)
PyObject* bias_relu(Arguments args) {
  const Params* params = parse_params(args[0]);
  PyArrayObject* x = params == nullptr ? nullptr : parse_array(args[1], "x", params->dtype);
  const int axis = x == nullptr ? -1 : parse_axis(args[3], x);
  PyArrayObject* bias = axis < 0 ? nullptr : parse_bias(args[2], x, axis);
  if (bias == nullptr) return nullptr;
  PyArrayObject* out = parse_out(args[4], x, PyArray_DESCR(x));
  PyObject* result = nullptr;
  if (out != nullptr) {
    Job job;
    job.kernel = kernel_of(*params, kBiasForward);
    job.params = params;
    add_operand(job, out);
    add_operand(job, x);
    int permutation[NPY_MAXDIMS];
    const int* axes = memory_order(job.operands[1], permutation) ? permutation : nullptr;
    job.bias = bias_of(bias, x, axis, axes);
    lay_out(job, axes);
    result = execute(job, out);
  }
  Py_DECREF(bias);
  return result;
}

// The tuple (out, Mask(mask, axes)), which takes over the references to both arrays.
PyObject* forward_result(PyArrayObject* out, PyArrayObject* mask, const int* axes, int ndim) {
  PyObject* residuals = mask_type->tp_alloc(mask_type, 2);
  PyObject* result = PyTuple_New(2);
  PyObject* order = axes == nullptr ? Py_None : PyTuple_New(ndim);
  if (axes == nullptr) Py_INCREF(order);
  for (int i = 0; axes != nullptr && order != nullptr && i < ndim; ++i) {
    PyObject* axis = PyLong_FromLong(axes[i]);
    if (axis == nullptr) Py_CLEAR(order);
    if (order != nullptr) PyTuple_SET_ITEM(order, i, axis);
  }
  if (residuals == nullptr || result == nullptr || order == nullptr) {
    Py_XDECREF(residuals);
    Py_XDECREF(result);
    Py_XDECREF(order);
    Py_DECREF(mask);
    Py_DECREF(out);
    return nullptr;
  }
#if PY_VERSION_HEX >= 0x030E0000
  reinterpret_cast<PyTupleObject*>(residuals)->ob_hash = -1;  // unknown, as PyTuple_New sets it
#endif
  PyTuple_SET_ITEM(residuals, 0, reinterpret_cast<PyObject*>(mask));
  PyTuple_SET_ITEM(residuals, 1, order);
  PyTuple_SET_ITEM(result, 0, reinterpret_cast<PyObject*>(out));
  PyTuple_SET_ITEM(result, 1, residuals);
  return result;
}

// (y, Mask), of x plus a bias if that is not null
PyObject* run_with_mask(const Params* params, PyArrayObject* x, PyArrayObject* bias, int axis,
                        PyObject* out_object, PyObject* mask_object) {
  PyArrayObject* mask;
  if (mask_object == Py_None) {
    npy_intp nbytes = mask_nbytes(*params, PyArray_SIZE(x));
    mask = reinterpret_cast<PyArrayObject*>(PyArray_SimpleNew(1, &nbytes, NPY_UINT8));
  } else {
    mask = parse_mask(mask_object, *params, PyArray_SIZE(x));
    if (mask != nullptr && !PyArray_ISWRITEABLE(mask)) {
      PyErr_SetString(PyExc_ValueError, "mask is read-only");
      return nullptr;
    }
    Py_XINCREF(mask);
  }
  if (mask == nullptr) return nullptr;
  PyArrayObject* out = parse_out(out_object, x, PyArray_DESCR(x));
  if (out == nullptr) {
    Py_DECREF(mask);
    return nullptr;
  }
  Job job;
  add_operand(job, out);
  add_operand(job, x);
  int permutation[NPY_MAXDIMS];
  const int* axes = memory_order(job.operands[1], permutation) ? permutation : nullptr;
  PyObject* result = forward_result(out, mask, axes, PyArray_NDIM(x));
  if (result == nullptr) return nullptr;

  job.params = params;
  job.mask = static_cast<unsigned char*>(PyArray_DATA(mask));
  if (params->three_branches != 0) {
    job.kernel = kernel_of(*params, bias == nullptr ? kForward : kBiasForward);
    job.branches = kernel_of(*params, bias == nullptr ? kBranches : kBiasBranches);
    job.branches_params = params;
  } else {
    job.kernel = kernel_of(*params, bias == nullptr ? kForwardBits : kBiasForwardBits);
  }
  if (bias != nullptr) job.bias = bias_of(bias, x, axis, axes);
  lay_out(job, axes);
  execute(job, out);
  return result;
}

// forward_with_mask(params, x, out, mask)
PyObject* forward_with_mask(Arguments args) {
  const Params* params = parse_params(args[0]);
  PyArrayObject* x = params == nullptr ? nullptr : parse_array(args[1], "x", params->dtype);
  return x == nullptr ? nullptr : run_with_mask(params, x, nullptr, 0, args[2], args[3]);
}

// bias_relu_with_mask(params, x, bias, axis, out, mask)
PyObject* bias_relu_with_mask(Arguments args) {
  const Params* params = parse_params(args[0]);
  PyArrayObject* x = params == nullptr ? nullptr : parse_array(args[1], "x", params->dtype);
  const int axis = x == nullptr ? -1 : parse_axis(args[3], x);
  PyArrayObject* bias = axis < 0 ? nullptr : parse_bias(args[2], x, axis);
  if (bias == nullptr) return nullptr;
  PyObject* result = run_with_mask(params, x, bias, axis, args[4], args[5]);
  Py_DECREF(bias);
  return result;
}

// Lays out the job of backward(params, dy, mask, axes, out), and returns its output.
PyArrayObject* prepare_backward(Arguments args, PyObject* out_object, Job& job) {
  const Params* params = parse_params(args[0]);
  PyArrayObject* dy = params == nullptr ? nullptr : parse_array(args[1], "dy", params->dtype);
  PyArrayObject* mask = dy == nullptr ? nullptr : parse_mask(args[2], *params, PyArray_SIZE(dy));
  int permutation[NPY_MAXDIMS];
  const int* axes = args[3] == Py_None ? nullptr : permutation;
  if (mask == nullptr || (axes != nullptr && !parse_axes(args[3], dy, permutation))) return nullptr;
  PyArrayObject* out = parse_out(out_object, dy, PyArray_DESCR(dy), axes);
  if (out == nullptr) return nullptr;
  job.kernel = kernel_of(*params, params->three_branches != 0 ? kBackwardBytes : kBackwardBits);
  job.params = params;
  job.mask = static_cast<unsigned char*>(PyArray_DATA(mask));
  add_operand(job, out);
  add_operand(job, dy);
  lay_out(job, axes);
  return out;
}

// backward(params, dy, mask, axes, out)
PyObject* backward(Arguments args) {
  Job job;
  PyArrayObject* out = prepare_backward(args, args[4], job);
  return out == nullptr ? nullptr : execute(job, out);
}

// Gives a WeightGrad or a BiasGrad memory, which `add_gradient` frees; returns false if there is
// none.
template <class Grad>
bool allocate_sums(Grad& grad) {
  const auto count = static_cast<std::size_t>(grad.num_partial_sums());
  grad.set_partial_sums(static_cast<double*>(PyMem_RawMalloc(count * sizeof(double))));
  return grad.partial_sums() != nullptr;
}

// Runs all parts and adds their sums to `total`; returns false if a part had no memory.
template <class Grad>
bool add_gradient(Grad& grad, PyObject* total, Py_ssize_t nbytes) {
  run_task(Grad::run, &grad, static_cast<std::size_t>(grad.units()), 1, 1, nbytes);
  void* sums = PyArray_DATA(reinterpret_cast<PyArrayObject*>(total));
  const bool done = grad.add_parts(static_cast<double*>(sums));
  PyMem_RawFree(grad.partial_sums());
  return done;
}

// Sums in their final dtype, float32 or float64: one NaN stands for all of them. Takes over the
// reference.
PyObject* finish_sums(PyObject* sums, bool narrow) {
  auto* array = reinterpret_cast<PyArrayObject*>(sums);
  auto* numbers = static_cast<double*>(PyArray_DATA(array));
  npy_intp count = PyArray_SIZE(array);
  for (npy_intp i = 0; i < count; ++i) {
    if (std::isnan(numbers[i])) numbers[i] = std::numeric_limits<double>::quiet_NaN();
  }
  if (!narrow) return sums;
  PyObject* result = PyArray_SimpleNew(1, &count, NPY_FLOAT32);
  if (result != nullptr) {
    auto* to = static_cast<float*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(result)));
    for (npy_intp i = 0; i < count; ++i) to[i] = static_cast<float>(numbers[i]);
  }
  Py_DECREF(sums);
  return result;
}

// Writes where the axis of the channels is in a permutation of an array's axes, or None; returns
// false if the other axes are not in C order, or it is elsewhere. Those of length 1 do not count.
bool find_channels(PyObject* axes, PyArrayObject* array, int axis, Channels* order) {
  *order = kInOrder;
  if (axes == Py_None) return true;
  int before = -1, count = 0, at = -1;
  for (int i = 0; i < PyArray_NDIM(array); ++i) {
    const int next = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(axes, i)));
    if (PyArray_DIM(array, next) == 1) continue;
    if (next == axis) {
      at = count;
    } else if (next < before) {
      return false;
    } else {
      before = next;
    }
    ++count;
  }
  *order = at == 0 ? kFirst : kLast;
  // Of fewer terms for each channel the lanes, of which there may be 128, would take more memory
  // than dx.
  const bool few = PyArray_SIZE(array) < 256 * PyArray_DIM(array, axis);
  return at == 0 || (at > 0 && at == count - 1 && !few);
}

// bias_relu_backward(params, dy, mask, axes, axis, dtype, out): (dx, its sum along all other axes).
// The sum has the dtype if that is float32, else float64.
PyObject* bias_relu_backward(Arguments args) {
  if (!PyArray_DescrCheck(args[5])) {
    PyErr_SetString(PyExc_TypeError, "dtype must be a numpy.dtype");
    return nullptr;
  }
  Job job;
  PyArrayObject* out = prepare_backward(args, args[6], job);
  if (out == nullptr) return nullptr;
  const int axis = parse_axis(args[4], out);
  npy_intp channels = axis < 0 ? 0 : PyArray_DIM(out, axis);
  PyObject* sums = axis < 0 ? nullptr : PyArray_ZEROS(1, &channels, NPY_FLOAT64, 0);
  if (sums == nullptr) {
    Py_DECREF(out);
    return nullptr;
  }
  const Operand *dx = job.operands, *dy = dx + 1;
  Channels order;
  // Otherwise dx is read again, in the order of C.
  const bool one_pass =
      dx->contiguous && dy->contiguous && find_channels(args[3], out, axis, &order);
  const Operation summed = job.params->three_branches != 0 ? kBackwardBytesSum : kBackwardBitsSum;
  BiasGrad grad(job.params, one_pass ? kernel_of(*job.params, summed)
                                     : kernel_of(kRelu[job.params->dtype], kSumChannels));
  add_operand(grad.job(), out);
  if (one_pass) grad.job().operands[grad.job().count++] = *dy;
  lay_out(grad.job(), nullptr);
  const auto nbytes = set_access(grad.job());
  grad.set_mask(job.mask);
  if (PyArray_SIZE(out) > 0) {
    grad.set_shape(PyArray_DIMS(out), PyArray_NDIM(out), axis, one_pass ? order : kInOrder);
    if (!allocate_sums(grad)) {  // before dy may be overwritten
      Py_DECREF(out);
      Py_DECREF(sums);
      return PyErr_NoMemory();
    }
    if (!one_pass) execute(job, out);
    add_gradient(grad, sums, nbytes);
  }
  const bool narrow = reinterpret_cast<PyArray_Descr*>(args[5])->type_num == NPY_FLOAT32;
  sums = finish_sums(sums, narrow);
  PyObject* result = sums == nullptr ? nullptr : PyTuple_Pack(2, out, sums);
  Py_XDECREF(sums);
  Py_DECREF(out);
  return result;
}

// backward_from_input(params, grad_params, dy, x, out). With None for dy: ones of the dtype of x.
PyObject* backward_from_input(Arguments args) {
  const Params *params = parse_params(args[0]), *grad_params = parse_params(args[1]);
  if (params == nullptr || grad_params == nullptr) return nullptr;
  PyArrayObject* x = parse_array(args[3], "x", params->dtype);
  if (x == nullptr) return nullptr;
  const bool ones = args[2] == Py_None;
  PyArrayObject* dy = parse_array(ones ? args[3] : args[2], "dy", grad_params->dtype);
  if (dy == nullptr || !check_shape(dy, x, "dy")) return nullptr;
  PyArrayObject* out = parse_out(args[4], x, PyArray_DESCR(dy));
  if (out == nullptr) return nullptr;
  Job job;
  job.params = grad_params;
  if (std::memcmp(params, grad_params, sizeof(Params)) == 0) {
    job.kernel = kernel_of(*params, kBackwardFromInput);
  } else {
    job.kernel = kernel_of(*grad_params, kBackwardBytes);
    job.branches = kernel_of(*params, kBranches);
    job.branches_params = params;
    job.branches_of = 2;
  }
  add_operand(job, out);
  if (ones) {
    add_ones(job, params->dtype, job.operands[0].itemsize);
  } else {
    add_operand(job, dy);
  }
  add_operand(job, x);
  lay_out(job);
  return execute(job, out);
}

// ---- Other activations --------------------------------------------------------------------------

// prelu(values, x, slopes, out): values where x is above 0, slopes * values elsewhere. With None
// for values: ones. With None for x: slopes * values, but values where a slope is 1.
PyObject* prelu(Arguments args) {
  PyArrayObject* slopes = parse_array(args[2], "slopes", kAnyFloating);
  if (slopes == nullptr) return nullptr;
  const int dtype = dtype_of(slopes);
  PyArrayObject* x = args[1] == Py_None ? nullptr : parse_array(args[1], "x", kAnyFloating);
  if (x == nullptr && args[1] != Py_None) return nullptr;
  PyArrayObject* values = args[0] == Py_None ? nullptr : parse_array(args[0], "values", dtype);
  if (values == nullptr && args[0] != Py_None) return nullptr;
  PyArrayObject* like = values != nullptr ? values : x != nullptr ? x : slopes;
  if ((x != nullptr && !check_shape(x, like, "x")) || !check_broadcast(slopes, like)) {
    return nullptr;
  }
  for (PyArrayObject* other : {x, slopes}) {  // the first that has a layout
    if (is_broadcast(like) && other != nullptr && PyArray_SAMESHAPE(other, like)) like = other;
  }
  PyArrayObject* out = parse_out(args[3], like, PyArray_DESCR(slopes));
  if (out == nullptr) return nullptr;
  Job job;
  job.params = &kRelu[dtype];
  Operation operation = kScale;
  add_operand(job, out);
  if (values != nullptr) {
    add_operand(job, values);
  } else {
    add_ones(job, dtype, job.operands[0].itemsize);
  }
  add_operand(job, slopes);
  if (x != nullptr) {
    add_operand(job, x);
    operation = kPrelu;
    if (dtype_of(x) != dtype) {
      operation = kPreluBytes;
      job.branches_params = &kRelu[dtype_of(x)];
      job.branches = kernel_of(*job.branches_params, kBranches);
      job.branches_of = 3;
    }
  }
  job.kernel = kernel_of(*job.params, operation);
  lay_out(job);
  return execute(job, out, operation == kPrelu && has_channels(job) ? run_channels : run_job);
}

// prelu_weight_grad(dy, x, shape): the sum of dy * x over all x at or below 0, in float64, of a
// shape that has the length 1 along the axes that are summed.
PyObject* prelu_weight_grad(Arguments args) {
  PyArrayObject* dy = parse_array(args[0], "dy", kAnyFloating);
  PyArrayObject* x = dy == nullptr ? nullptr : parse_array(args[1], "x", kAnyFloating);
  if (x == nullptr || !check_shape(dy, x, "dy")) return nullptr;
  PyArray_Dims shape = {nullptr, 0};
  if (PyArray_IntpConverter(args[2], &shape) == 0) return nullptr;
  PyObject* result = PyArray_ZEROS(shape.len, shape.ptr, NPY_FLOAT64, 0);
  PyDimMem_FREE(shape.ptr);
  if (result == nullptr) return nullptr;
  auto* total = reinterpret_cast<PyArrayObject*>(result);
  if (!check_broadcast(total, x)) {
    Py_DECREF(result);
    return nullptr;
  }
  if (PyArray_SIZE(x) == 0) return result;

  WeightGrad grad(kernel_of(kRelu[dtype_of(dy)], kToDouble),
                  kernel_of(kRelu[dtype_of(x)], kToDouble));
  add_operand(grad.job(), dy);
  add_operand(grad.job(), x);
  lay_out(grad.job(), nullptr);
  grad.set_shape(PyArray_DIMS(total));
  const auto nbytes = PyArray_SIZE(x) * static_cast<Py_ssize_t>(sizeof(double));
  if (allocate_sums(grad) && add_gradient(grad, result, nbytes)) return result;
  Py_DECREF(result);
  return PyErr_NoMemory();
}

// An operation over one to three arrays, the last one None or the output. Those of kCreluMask and
// the third input of kCreluBackward are bytes, all others have one floating dtype.
template <Operation operation, int inputs>
PyObject* elementwise(Arguments args) {
  PyArrayObject* arrays[inputs];
  Job job;
  job.count = 1;  // the output comes when the inputs are known to be arrays
  int dtype = kAnyFloating;
  for (int i = 0; i < inputs; ++i) {
    const bool bytes = operation == kCreluBackward && i == 2;
    arrays[i] = parse_array(args[i], "an input", bytes ? static_cast<int>(kUInt8) : dtype);
    if (arrays[i] == nullptr || !check_shape(arrays[i], arrays[0], "an input")) return nullptr;
    dtype = dtype_of(arrays[0]);
    add_operand(job, arrays[i]);
  }
  PyArray_Descr* byte = PyArray_DescrFromType(NPY_UINT8);
  // A result lies in memory as the last input does (as dy, or as the mask and so as x), unless that
  // is a broadcast view.
  PyArrayObject* like = arrays[is_broadcast(arrays[inputs - 1]) ? 0 : inputs - 1];
  PyArrayObject* out =
      parse_out(args[inputs], like, operation == kCreluMask ? byte : PyArray_DESCR(arrays[0]));
  Py_DECREF(byte);
  if (out == nullptr) return nullptr;
  job.count = 0;
  add_operand(job, out);
  job.count = inputs + 1;
  job.params = &kRelu[dtype];
  job.kernel = kernel_of(*job.params, operation);
  lay_out(job);
  return execute(job, out);
}

// ---- Other functions ----------------------------------------------------------------------------

// is_valid_out(out, like, other): whether all are contiguous arrays, `out` has the dtype and shape
// of `like`, may be written, and is the very array `like` or `other`, or shares no memory with
// them. A fast check: an array that fails it may be valid all the same.
PyObject* is_valid_out(Arguments args) {
  PyArrayObject* arrays[3];
  for (int i = 0; i < 3; ++i) {
    if (!PyArray_Check(args[i])) Py_RETURN_FALSE;
    arrays[i] = reinterpret_cast<PyArrayObject*>(args[i]);
    if (!PyArray_ISCARRAY_RO(arrays[i])) Py_RETURN_FALSE;
  }
  if (PyArray_DESCR(arrays[0]) != PyArray_DESCR(arrays[1]) ||
      !PyArray_SAMESHAPE(arrays[0], arrays[1])) {
    Py_RETURN_FALSE;
  }
  if (!PyArray_ISWRITEABLE(arrays[0]) || Py_TYPE(args[0]) != Py_TYPE(args[1])) Py_RETURN_FALSE;
  const char* out = PyArray_BYTES(arrays[0]);
  const npy_intp nbytes = PyArray_NBYTES(arrays[0]);
  for (int i = 1; i < 3; ++i) {
    const char* data = PyArray_BYTES(arrays[i]);
    const char* end = data + PyArray_NBYTES(arrays[i]);
    if (args[i] != args[0] && data < out + nbytes && out < end) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* get_num_threads(Arguments /*args*/) { return PyLong_FromLong(ThreadPool::threads()); }

PyObject* set_num_threads(Arguments args) {
  const long threads = PyLong_AsLong(args[0]);
  if (threads == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (threads < 1 || threads > kMaxThreads) {
    PyErr_Format(PyExc_ValueError, "the number of threads must be from 1 to %d", kMaxThreads);
    return nullptr;
  }
  ThreadPool::set_threads(static_cast<int>(threads));
  Py_RETURN_NONE;
}

// set_limits(release, threads, stream): bytes of a result; returns what they were before. For
// tests, which send small arrays through the code for large ones.
PyObject* set_limits(Arguments args) {
  std::atomic<Py_ssize_t>* const all[] = {&limits.release, &limits.threads, &limits.stream};
  Py_ssize_t wanted[3];
  for (int i = 0; i < 3; ++i) {
    wanted[i] = PyLong_AsSsize_t(args[i]);
    if (wanted[i] == -1 && PyErr_Occurred() != nullptr) return nullptr;
  }
  for (int i = 0; i < 3; ++i) wanted[i] = all[i]->exchange(wanted[i]);
  return Py_BuildValue("nnn", wanted[0], wanted[1], wanted[2]);
}

// Ends the worker threads; later calls do without.
PyObject* shut_down(Arguments /*args*/) {
  ThreadPool* pool = ThreadPool::instance();
  PyThreadState* state = PyEval_SaveThread();
  if (pool != nullptr) pool->shut_down();
  PyEval_RestoreThread(state);
  Py_RETURN_NONE;
}

// ---- The module ---------------------------------------------------------------------------------

template <PyObject* (*function)(Arguments), Py_ssize_t num_arguments>
PyObject* call(PyObject* /*module*/, Arguments args, Py_ssize_t count) {
  if (count == num_arguments) return function(args);
  PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", num_arguments, count);
  return nullptr;
}

template <PyObject* (*function)(Arguments), Py_ssize_t num_arguments>
PyMethodDef method(const char* name) noexcept {
  auto* const address = reinterpret_cast<void (*)()>(call<function, num_arguments>);
  return {name, reinterpret_cast<PyCFunction>(address), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<forward, 3>("forward"),
    method<forward_with_mask, 4>("forward_with_mask"),
    method<backward, 5>("backward"),
    method<backward_from_input, 5>("backward_from_input"),
    method<bias_relu, 5>("bias_relu"),
    method<bias_relu_with_mask, 6>("bias_relu_with_mask"),
    method<bias_relu_backward, 7>("bias_relu_backward"),
    method<prelu, 4>("prelu"),
    method<prelu_weight_grad, 3>("prelu_weight_grad"),
    method<elementwise<kSquaredRelu, 1>, 2>("squared_relu"),
    method<elementwise<kSquaredReluBackward, 2>, 3>("squared_relu_backward"),
    method<elementwise<kNegatedRelu, 1>, 2>("negated_relu"),
    method<elementwise<kCreluMask, 1>, 2>("crelu_mask"),
    method<elementwise<kCreluBackward, 3>, 4>("crelu_backward"),
    method<is_valid_out, 3>("is_valid_out"),
    method<get_num_threads, 0>("get_num_threads"),
    method<set_num_threads, 1>("set_num_threads"),
    method<set_limits, 3>("set_limits"),
    method<shut_down, 0>("shut_down"),
    {nullptr, nullptr, 0, nullptr},
};

// The best instruction set of the processor, or the one that RELU_XP_CPU names.
const InstructionSet* choose_instruction_set() {
  const char* name = std::getenv("RELU_XP_CPU");
  if (name != nullptr && *name == '\0') name = nullptr;
  const InstructionSet* found = find_instruction_set(name);
  if (found != nullptr && found->available) return found;
  if (name == nullptr) {
    PyErr_SetString(PyExc_ImportError, "this processor is older than x86-64-v2");
  } else if (found != nullptr) {
    PyErr_Format(PyExc_ValueError,
                 "RELU_XP_CPU asks for %s, which this processor does not have; unset it", name);
  } else {
#ifdef RELU_XP_X86
    const char* names = "x86-64-v2, x86-64-v3 or x86-64-v4";
#else
    const char* names = "baseline on this processor";
#endif
    PyErr_Format(PyExc_ValueError, "RELU_XP_CPU must be %s, got '%s'", names, name);
  }
  return nullptr;
}

int initialize(PyObject* module) {
  if (PyArray_ImportNumPyAPI() < 0) return -1;
  const InstructionSet* set = choose_instruction_set();
  PyObject* mask = set == nullptr ? nullptr : PyImport_ImportModule("relu_xp.mask");
  PyObject* type = mask == nullptr ? nullptr : PyObject_GetAttrString(mask, "Mask");
  Py_XDECREF(mask);
  if (type == nullptr) return -1;
  active_kernels = set->kernels;
  mask_type = reinterpret_cast<PyTypeObject*>(type);
  if (PyModule_AddIntConstant(module, "max_threads", kMaxThreads) < 0) return -1;
  return PyModule_AddStringConstant(module, "instruction_set", set->name);
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(initialize)},
#if PY_VERSION_HEX >= 0x030D0000
    // Nothing is shared among calls but the thread pool, which guards itself.
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "relu_xp.kernels._cpu",
    nullptr,
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace relu_xp

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&relu_xp::definition); }
