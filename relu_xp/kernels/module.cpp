// The Python module: arrays in, arrays out. It checks what the kernels rely on (types, dtypes,
// shapes, whether an output may be written), allocates results, finds the order in which elements
// are taken, and shares large arrays among threads. What a caller may do beyond that, and the
// messages, are Python's business.
//
// No frame from which the GIL is released has a destructor or is noexcept: at exit CPython ends a
// thread that asks for the GIL by unwinding its stack.

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

#ifdef RELU_XP_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu_kernels.h"
#include "thread_pool.h"

namespace relu_xp {
namespace {

const KernelTable* kernels = nullptr;   // those of the chosen instruction set
const char* instruction_set = nullptr;  // its name
PyTypeObject* mask_type = nullptr;      // relu_xp.mask.Mask, a tuple of two

// Bytes of a result, from which on a call does something that smaller ones are not worth.
struct Limits {
  std::atomic<Py_ssize_t> release{Py_ssize_t{1} << 15};  // releases the GIL
  std::atomic<Py_ssize_t> threads{Py_ssize_t{1} << 19};  // uses threads
  std::atomic<Py_ssize_t> stream{Py_ssize_t{1} << 25};   // stores past the caches
};
Limits limits;

constexpr std::size_t kStep = 4096;  // elements of the smallest part of a thread
// Elements that a thread takes at a time. A larger share does not stay in the caches from one call
// to the next, so that nothing is lost where another thread takes the rest of it.
constexpr std::size_t kPart = std::size_t{1} << 17;
constexpr std::size_t kStaged = 4096;  // elements that go through two kernels
constexpr std::size_t kGathered = 1024;
constexpr int kInputs = 3;
constexpr int kMaxThreads = 1024;

constexpr std::uint64_t kInfinity[kFloatingDtypes] = {0x7c00, 0x7f80, 0x7f800000,
                                                      0x7ff0000000000000};
constexpr std::size_t kItemSize[kDtypes] = {2, 2, 4, 8, 1, 1, 2, 2, 4, 4, 8, 8};

// ---- A job: kernels over whole arrays -----------------------------------------------------------

struct Operand {
  char* data;
  npy_intp strides[NPY_MAXDIMS];  // of the job's axes, in bytes; not set where contiguous
  std::size_t itemsize;
  bool contiguous;  // in the job's order, and aligned
  bool constant;    // a buffer of `kStaged` equal elements, whatever the position
};

enum class MaskKind : std::int8_t { kNone, kBits, kBytes };

struct Job {
  ThreadPool::Task task = nullptr;  // `run` by default, or `run_channels`
  Kernel kernel;
  const Numbers* numbers;
  // A kernel that runs before it on one of the inputs and writes the branches: into the mask if
  // there is one, else into a buffer that `kernel` reads as its mask.
  Kernel branches = nullptr;
  const Numbers* branches_numbers = nullptr;
  int branches_input = 0;
  Operand out;
  Operand in[kInputs];
  int inputs;
  unsigned char* mask = nullptr;
  MaskKind mask_kind = MaskKind::kNone;
  int ndim;
  npy_intp shape[NPY_MAXDIMS];
  std::size_t size;
  bool stream = false;
  bool prefetch = false;
};

// Goes through the elements of a job's axes from one on, the last axis fastest.
class Odometer {
 public:
  Odometer(const Job& job, const Operand& operand, std::size_t position)
      : job_(job), operand_(operand), at_(operand.data) {
    for (int axis = job.ndim - 1; axis >= 0; --axis) {
      const auto length = static_cast<std::size_t>(job.shape[axis]);
      index_[axis] = static_cast<npy_intp>(position % length);
      position /= length;
      at_ += index_[axis] * operand.strides[axis];
    }
  }

  // Calls run(address, stride, n) for runs along the last axis, `count` elements in all.
  template <class Run>
  void for_each_run(std::size_t count, Run run) {
    const int last = job_.ndim - 1;
    const npy_intp stride = operand_.strides[last];
    while (count > 0) {
      const npy_intp n = std::min(static_cast<npy_intp>(count), job_.shape[last] - index_[last]);
      run(at_, stride, n);
      count -= static_cast<std::size_t>(n);
      index_[last] += n;
      at_ += n * stride;
      for (int axis = last; axis > 0 && index_[axis] == job_.shape[axis]; --axis) {
        at_ += operand_.strides[axis - 1] - index_[axis] * operand_.strides[axis];
        index_[axis] = 0;
        ++index_[axis - 1];
      }
    }
  }

 private:
  const Job& job_;
  const Operand& operand_;
  char* at_;
  npy_intp index_[NPY_MAXDIMS];
};

template <class T>
void gather(const Job& job, const Operand& operand, std::size_t position, std::size_t n, void* to) {
  T* next = static_cast<T*>(to);
  Odometer(job, operand, position)
      .for_each_run(n, [&](const char* at, npy_intp stride, npy_intp run) {
        constexpr auto size = static_cast<npy_intp>(sizeof(T));
        if (stride == size) {
          std::memcpy(next, at, static_cast<std::size_t>(run) * sizeof(T));
        } else if (stride == 0) {
          T value;
          std::memcpy(&value, at, sizeof(T));
          std::fill(next, next + run, value);
        } else if (stride == 2 * size) {  // every second element, or one part of complex numbers
          for (npy_intp i = 0; i < run; ++i) std::memcpy(next + i, at + i * 2 * size, sizeof(T));
        } else {
          for (npy_intp i = 0; i < run; ++i) std::memcpy(next + i, at + i * stride, sizeof(T));
        }
        next += run;
      });
}

template <class T>
void scatter(const Job& job, const Operand& operand, std::size_t position, std::size_t n,
             const void* from) {
  const T* next = static_cast<const T*>(from);
  Odometer(job, operand, position).for_each_run(n, [&](char* at, npy_intp stride, npy_intp run) {
    for (npy_intp i = 0; i < run; ++i) std::memcpy(at + i * stride, next + i, sizeof(T));
    next += run;
  });
}

// A word for a function that takes no more of an element than its size.
template <class Function>
void with_item(std::size_t itemsize, Function function) {
  switch (itemsize) {
    case 1:
      return function(std::uint8_t{});
    case 2:
      return function(std::uint16_t{});
    case 4:
      return function(std::uint32_t{});
    default:
      return function(std::uint64_t{});
  }
}

// Where an input's elements from `position` on lie one behind the other: in its own memory, or in a
// buffer.
const char* resolve(const Job& job, const Operand& operand, std::size_t position, std::size_t n,
                    void* buffer) {
  if (operand.constant) return operand.data;
  if (operand.contiguous) return operand.data + position * operand.itemsize;
  with_item(operand.itemsize,
            [&](auto item) { gather<decltype(item)>(job, operand, position, n, buffer); });
  return static_cast<const char*>(buffer);
}

// Runs a job over the elements from `begin` to `end`; where there is a mask, `begin` is a multiple
// of kStep.
void run(void* context, std::size_t begin, std::size_t end) {
  const Job& job = *static_cast<const Job*>(context);
  alignas(64) char buffers[kInputs + 1][kGathered * sizeof(double)];
  unsigned char bytes[kStaged];
  std::size_t chunk = job.branches != nullptr || job.in[0].constant ? kStaged : end - begin;
  if (!job.out.contiguous) chunk = kGathered;
  for (int i = 0; i < job.inputs; ++i) {
    if (!job.in[i].contiguous) chunk = kGathered;
  }
  for (std::size_t at = begin; at < end; at += chunk) {
    Block block{};
    block.count = std::min(chunk, end - at);
    for (int i = 0; i < job.inputs; ++i) {
      // Not of a buffer, and of x once where it is the value too.
      const bool own = job.in[i].contiguous && !job.in[i].constant;
      const bool first = i == 0 || job.in[i].data != job.in[0].data;
      if (job.prefetch && own && first) block.prefetch |= 1u << i;
      block.in[i] = resolve(job, job.in[i], at, block.count, buffers[i]);
    }
    if (job.mask != nullptr) {
      block.mask = job.mask + (job.mask_kind == MaskKind::kBits ? at / 8 : at);
    }
    if (job.branches != nullptr) {
      if (job.mask == nullptr) block.mask = bytes;
      Block first = block;
      first.in[0] = block.in[job.branches_input];
      first.prefetch = block.prefetch >> job.branches_input & 1;
      job.branches(*job.branches_numbers, first);
    }
    block.stream = job.stream && job.out.contiguous;
    block.out = job.out.contiguous ? job.out.data + at * job.out.itemsize : buffers[kInputs];
    job.kernel(*job.numbers, block);
    if (!job.out.contiguous) {
      with_item(job.out.itemsize, [&](auto item) {
        scatter<decltype(item)>(job, job.out, at, block.count, block.out);
      });
    }
  }
}

// Runs a PReLU whose slope stays the same over runs of elements, which are a leaky ReLU each: no
// slopes are gathered (16x64x56x56 float32: a third less time).
void run_channels(void* context, std::size_t begin, std::size_t end) {
  const Job& job = *static_cast<const Job*>(context);
  const Operand &values = job.in[0], &x = job.in[2];
  const int dtype = job.numbers->dtype;
  Numbers numbers = *job.numbers;
  std::size_t at = begin;
  const auto run_of_slope = [&](const char* slope, npy_intp /*stride*/, npy_intp n) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, slope, values.itemsize);  // little-endian: see `initialize`
    const std::uint64_t magnitude = bits & ((std::uint64_t{1} << (8 * values.itemsize - 1)) - 1);
    if (magnitude > kInfinity[dtype]) {  // a NaN slope is kept as it is
      run(context, at, at + static_cast<std::size_t>(n));
      at += static_cast<std::size_t>(n);
      return;
    }
    const Variant variant = magnitude == 0 ? kPlain : kLeaky;
    numbers.negative_slope = magnitude == 0 ? 0 : bits;
    const auto& operations = kernels->floating[dtype];
    Block block{};
    block.count = static_cast<std::size_t>(n);
    block.out = job.out.data + at * job.out.itemsize;
    block.in[0] = values.data + at * values.itemsize;
    block.in[1] = x.data + at * x.itemsize;
    block.stream = job.stream;
    if (values.data == x.data) {
      block.prefetch = job.prefetch ? 1 : 0;
      operations[kForward][variant](numbers, block);
    } else {
      block.prefetch = job.prefetch ? 3 : 0;
      operations[kBackwardFromInput][variant](numbers, block);
    }
    at += block.count;
  };
  Odometer(job, job.in[1], begin).for_each_run(end - begin, run_of_slope);
}

// Whether `run_channels` may run a PReLU, and each run is long enough to be worth a call.
bool has_channels(const Job& job) {
  const Operand& slopes = job.in[1];
  return job.out.contiguous && job.in[0].contiguous && !job.in[0].constant &&
         job.in[2].contiguous && !slopes.contiguous && slopes.strides[job.ndim - 1] == 0 &&
         job.shape[job.ndim - 1] >= 256;
}

void execute(Job& job) {
  if (job.size == 0) return;
  if (job.task == nullptr) job.task = run;
  const auto nbytes = static_cast<Py_ssize_t>(job.size * job.out.itemsize);
  if (nbytes < limits.release) {
    job.task(&job, 0, job.size);
    return;
  }
  bool in_place = false;
  for (int i = 0; i < job.inputs; ++i) in_place |= job.in[i].data == job.out.data;
  job.stream = nbytes >= limits.stream && !in_place;
  job.prefetch = nbytes >= limits.threads;
  PyThreadState* state = PyEval_SaveThread();
  ThreadPool* pool = nbytes >= limits.threads ? ThreadPool::instance() : nullptr;
  if (pool != nullptr) {
    pool->parallel_for(job.size, kStep, kPart, job.task, &job);
  } else {
    job.task(&job, 0, job.size);
  }
  PyEval_RestoreThread(state);
}

// ---- Layout -------------------------------------------------------------------------------------

bool is_contiguous(PyArrayObject* array, int order) {
  const auto address = reinterpret_cast<std::uintptr_t>(PyArray_DATA(array));
  return (PyArray_FLAGS(array) & order) != 0 &&
         address % static_cast<std::uintptr_t>(PyArray_ITEMSIZE(array)) == 0;
}

// Sorts axes by strides, from the slowest in memory to the fastest; equal ones stay as they are.
void sort_axes(const npy_intp* strides, int* axes, int count) {
  for (int i = 1; i < count; ++i) {
    for (int k = i; k > 0; --k) {
      if (std::abs(strides[axes[k]]) <= std::abs(strides[axes[k - 1]])) break;
      std::swap(axes[k], axes[k - 1]);
    }
  }
}

// The order in which the mask of an array counts elements, as relu_xp.mask.memory_order returns it.
// Writes the axes from the slowest to the fastest, and returns whether that is another order than
// C's.
bool memory_order(PyArrayObject* array, int* axes) {
  const int ndim = PyArray_NDIM(array);
  const npy_intp *shape = PyArray_DIMS(array), *strides = PyArray_STRIDES(array);
  int count = 0;
  int sorted[NPY_MAXDIMS];
  for (int axis = 0; axis < ndim; ++axis) {
    axes[axis] = axis;
    if (shape[axis] != 1) sorted[count++] = axis;
  }
  if (PyArray_IS_C_CONTIGUOUS(array) || PyArray_SIZE(array) == 0) return false;
  sort_axes(strides, sorted, count);
  npy_intp expected = PyArray_ITEMSIZE(array);
  for (int i = count - 1; i >= 0; --i) {
    if (strides[sorted[i]] != expected) return false;
    expected *= shape[sorted[i]];
  }
  for (int axis = 0, i = 0; axis < ndim; ++axis) {
    if (shape[axis] != 1) axes[axis] = sorted[i++];
  }
  return true;
}

// What a job's operands are made of: an array, or null for a constant.
struct Source {
  PyArrayObject* array;
  Operand* operand;
};

// Sets the operands' addresses, and returns whether all arrays are contiguous in one order (that of
// C or of Fortran) and as large as the job: then there is no more to say of how they lie.
bool set_contiguous(Job& job, const Source* sources, int count, int order) {
  bool all = true;
  for (int i = 0; i < count; ++i) {
    PyArrayObject* array = sources[i].array;
    if (array == nullptr) continue;
    Operand& operand = *sources[i].operand;
    operand.data = PyArray_BYTES(array);
    operand.itemsize = static_cast<std::size_t>(PyArray_ITEMSIZE(array));
    operand.contiguous = is_contiguous(array, order);
    operand.constant = false;
    all &= operand.contiguous && PyArray_SIZE(array) == static_cast<npy_intp>(job.size);
  }
  return all;
}

// Sets axes, strides and contiguity, for elements taken in the order of `axes`. Axes of length 1
// are left out, and those that are one in every operand are joined.
void set_axes(Job& job, const Source* sources, int count, PyArrayObject* like, const int* axes) {
  const npy_intp* shape = PyArray_DIMS(like);
  job.ndim = 0;
  for (int k = 0; k < PyArray_NDIM(like); ++k) {
    const int axis = axes[k];
    if (shape[axis] == 1) continue;
    bool joined = job.ndim > 0;
    for (int i = 0; i < count; ++i) {
      if (sources[i].array == nullptr) continue;
      npy_intp* strides = sources[i].operand->strides;
      // An operand of length 1 along an axis is the same all along it.
      const bool repeated = PyArray_DIM(sources[i].array, axis) == 1;
      strides[job.ndim] = repeated ? 0 : PyArray_STRIDE(sources[i].array, axis);
      joined &= job.ndim > 0 && strides[job.ndim - 1] == strides[job.ndim] * shape[axis];
    }
    if (joined) {
      job.shape[job.ndim - 1] *= shape[axis];
      for (int i = 0; i < count; ++i) {
        npy_intp* strides = sources[i].operand->strides;
        if (sources[i].array != nullptr) strides[job.ndim - 1] = strides[job.ndim];
      }
    } else {
      job.shape[job.ndim++] = shape[axis];
    }
  }
  if (job.ndim == 0) {  // one element
    job.shape[job.ndim++] = 1;
    for (int i = 0; i < count; ++i) sources[i].operand->strides[0] = 0;
  }
  for (int i = 0; i < count; ++i) {
    if (sources[i].array == nullptr) continue;
    Operand& operand = *sources[i].operand;
    auto expected = static_cast<npy_intp>(operand.itemsize);
    operand.contiguous = reinterpret_cast<std::uintptr_t>(operand.data) % operand.itemsize == 0;
    for (int axis = job.ndim - 1; axis >= 0; --axis) {
      operand.contiguous &= job.shape[axis] == 1 || operand.strides[axis] == expected;
      expected *= job.shape[axis];
    }
  }
}

// Lays out a job whose elements may be taken in any order: `out` is written as it lies in memory.
void lay_out(Job& job, const Source* sources, int count, PyArrayObject* like) {
  job.size = static_cast<std::size_t>(PyArray_SIZE(like));
  if (set_contiguous(job, sources, count, NPY_ARRAY_C_CONTIGUOUS) ||
      set_contiguous(job, sources, count, NPY_ARRAY_F_CONTIGUOUS)) {
    return;
  }
  int axes[NPY_MAXDIMS];
  for (int axis = 0; axis < PyArray_NDIM(like); ++axis) axes[axis] = axis;
  sort_axes(PyArray_STRIDES(sources[0].array), axes, PyArray_NDIM(like));
  set_axes(job, sources, count, like, axes);
}

// Likewise for elements in the order of a mask; `axes` is null for C order.
void lay_out_in_order(Job& job, const Source* sources, int count, PyArrayObject* like,
                      const int* axes) {
  job.size = static_cast<std::size_t>(PyArray_SIZE(like));
  if (set_contiguous(job, sources, count, NPY_ARRAY_C_CONTIGUOUS) && axes == nullptr) return;
  int c_order[NPY_MAXDIMS];
  for (int axis = 0; axis < PyArray_NDIM(like); ++axis) c_order[axis] = axis;
  set_axes(job, sources, count, like, axes == nullptr ? c_order : axes);
}

// ---- Arguments ----------------------------------------------------------------------------------

bool check_count(const char* function, Py_ssize_t count, Py_ssize_t expected) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, expected, count);
  return false;
}

// An array's dtype, or -1 if no kernel takes it.
int dtype_of(PyArrayObject* array) {
  const PyArray_Descr* descr = PyArray_DESCR(array);
  if (!PyArray_ISNBO(descr->byteorder)) return -1;
  const npy_intp size = PyArray_ITEMSIZE(array);
  switch (descr->kind) {
    case 'f':
      return size == 4 ? kFloat32 : size == 8 ? kFloat64 : size == 2 ? kFloat16 : -1;
    case 'V':  // ml_dtypes' class of two bytes; a record has NumPy's own number
      return size == 2 && PyTypeNum_ISUSERDEF(descr->type_num) ? kBFloat16 : -1;
    case 'i':
    case 'u': {
      const int unsigned_too = descr->kind == 'u' ? 1 : 0;
      for (int width = 0; width < 4; ++width) {
        if (size == npy_intp{1} << width) return kInt8 + 2 * width + unsigned_too;
      }
      return -1;
    }
    default:
      return -1;
  }
}

PyArrayObject* array_of(PyObject* object, const char* name) {
  if (PyArray_Check(object)) return reinterpret_cast<PyArrayObject*>(object);
  PyErr_Format(PyExc_TypeError, "%s must be an ndarray, got %s", name, Py_TYPE(object)->tp_name);
  return nullptr;
}

// An array of a floating dtype, which goes to `dtype`.
PyArrayObject* floating_array(PyObject* object, const char* name, int& dtype) {
  PyArrayObject* array = array_of(object, name);
  if (array == nullptr) return nullptr;
  dtype = dtype_of(array);
  if (dtype >= 0 && dtype < kFloatingDtypes) return array;
  PyErr_Format(PyExc_TypeError, "%s must have a floating dtype of the machine's byte order", name);
  return nullptr;
}

const Numbers* numbers_of(PyObject* object) {
  if (PyBytes_Check(object) && PyBytes_GET_SIZE(object) == sizeof(Numbers)) {
    const auto* numbers = reinterpret_cast<const Numbers*>(PyBytes_AS_STRING(object));
    if (numbers->dtype >= 0 && numbers->dtype < kDtypes && numbers->variant >= 0 &&
        numbers->variant < kVariants) {
      return numbers;
    }
  }
  PyErr_SetString(PyExc_TypeError, "numbers must be a record of relu_xp.activation.Rounded");
  return nullptr;
}

// An array of the dtype of `numbers`.
PyArrayObject* array_for(const Numbers* numbers, PyObject* object, const char* name) {
  PyArrayObject* array = array_of(object, name);
  if (array == nullptr || dtype_of(array) == numbers->dtype) return array;
  PyErr_Format(PyExc_TypeError, "%s has another dtype than the numbers", name);
  return nullptr;
}

bool check_shape(PyArrayObject* array, PyArrayObject* like, const char* name) {
  if (PyArray_SAMESHAPE(array, like)) return true;
  PyErr_Format(PyExc_ValueError, "%s has another shape than the other arrays", name);
  return false;
}

// A new reference to a result: `object`, if it is an array of a shape and dtype that may be
// written; if it is None a fresh one, in the layout of `like`.
PyArrayObject* out_array(PyObject* object, PyArrayObject* like, PyArray_Descr* descr) {
  if (object == Py_None) {
    Py_INCREF(descr);
    if (PyArray_IS_C_CONTIGUOUS(like)) {
      return reinterpret_cast<PyArrayObject*>(
          PyArray_NewFromDescr(&PyArray_Type, descr, PyArray_NDIM(like), PyArray_DIMS(like),
                               nullptr, nullptr, 0, nullptr));
    }
    return reinterpret_cast<PyArrayObject*>(PyArray_NewLikeArray(like, NPY_KEEPORDER, descr, 0));
  }
  PyArrayObject* out = array_of(object, "out");
  if (out == nullptr || !check_shape(out, like, "out")) return nullptr;
  if (PyArray_DESCR(out)->kind != descr->kind ||
      PyArray_ITEMSIZE(out) != PyDataType_ELSIZE(descr) ||
      !PyArray_ISNBO(PyArray_DESCR(out)->byteorder)) {
    PyErr_SetString(PyExc_TypeError, "out has another dtype than the result");
    return nullptr;
  }
  if (!PyArray_ISWRITEABLE(out)) {
    PyErr_SetString(PyExc_ValueError, "out is read-only");
    return nullptr;
  }
  Py_INCREF(out);
  return out;
}

// A contiguous array of at least as many bytes as the mask of `size` elements has.
PyArrayObject* mask_array(PyObject* object, const Numbers* numbers, npy_intp size, bool written) {
  PyArrayObject* mask = array_of(object, "mask");
  if (mask == nullptr) return nullptr;
  if (PyArray_TYPE(mask) != NPY_UINT8 || PyArray_NDIM(mask) != 1 ||
      !PyArray_IS_C_CONTIGUOUS(mask) || (written && !PyArray_ISWRITEABLE(mask))) {
    PyErr_SetString(PyExc_TypeError, "mask must be a contiguous array of uint8 with one axis");
    return nullptr;
  }
  if (PyArray_DIM(mask, 0) < (numbers->three_branches != 0 ? size : (size + 7) / 8)) {
    PyErr_SetString(PyExc_ValueError, "mask is too short");
    return nullptr;
  }
  return mask;
}

Kernel floating(const Numbers* numbers, Operation operation) {
  return kernels->floating[numbers->dtype][operation][numbers->variant];
}

Kernel other(int dtype, Operation operation) {
  return kernels->other[dtype][operation - kVariantOperations];
}

constexpr Numbers kRelu[kFloatingDtypes] = {{0, 0, 0x3c00, 0, kFloat16, kPlain, 0, {}},
                                            {0, 0, 0x3f80, 0, kBFloat16, kPlain, 0, {}},
                                            {0, 0, 0x3f800000, 0, kFloat32, kPlain, 0, {}},
                                            {0, 0, 0x3ff0000000000000, 0, kFloat64, kPlain, 0, {}}};

// `kStaged` ones of a dtype, as a constant operand.
struct Ones {
  alignas(64) char data[kStaged * sizeof(double)];
};

void set_ones(Ones& ones, int dtype, PyArrayObject* like, Operand& operand) {
  const std::size_t count = std::min(kStaged, static_cast<std::size_t>(PyArray_SIZE(like)));
  operand.data = ones.data;
  operand.itemsize = kItemSize[dtype];
  with_item(operand.itemsize, [&](auto item) {
    auto* words = reinterpret_cast<decltype(item)*>(ones.data);
    std::fill(words, words + count, static_cast<decltype(item)>(kRelu[dtype].positive_slope));
  });
  operand.contiguous = operand.constant = true;
}

PyObject* object_of(PyArrayObject* array) { return reinterpret_cast<PyObject*>(array); }

// ---- Functions ----------------------------------------------------------------------------------

PyObject* forward(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("forward", count, 3)) return nullptr;
  const Numbers* numbers = numbers_of(args[0]);
  PyArrayObject* x = numbers == nullptr ? nullptr : array_for(numbers, args[1], "x");
  if (x == nullptr) return nullptr;
  PyArrayObject* out = out_array(args[2], x, PyArray_DESCR(x));
  if (out == nullptr) return nullptr;
  Job job;
  job.kernel = numbers->dtype < kFloatingDtypes ? floating(numbers, kForward)
                                                : kernels->integer[numbers->dtype - kInt8];
  job.numbers = numbers;
  job.inputs = 1;
  const Source sources[] = {{out, &job.out}, {x, &job.in[0]}};
  lay_out(job, sources, 2, x);
  execute(job);
  return object_of(out);
}

PyObject* axes_tuple(const int* axes, int ndim) {
  PyObject* tuple = PyTuple_New(ndim);
  for (int i = 0; tuple != nullptr && i < ndim; ++i) {
    PyObject* axis = PyLong_FromLong(axes[i]);
    if (axis == nullptr) {
      Py_CLEAR(tuple);
    } else {
      PyTuple_SET_ITEM(tuple, i, axis);
    }
  }
  return tuple;
}

// The tuple (out, Mask(mask, axes)), which takes over both references; on an error they are
// dropped.
PyObject* forward_result(PyArrayObject* out, PyArrayObject* mask, const int* axes, int ndim) {
  PyObject* order = axes == nullptr ? Py_None : axes_tuple(axes, ndim);
  if (axes == nullptr) Py_INCREF(order);
  PyObject* saved = order == nullptr ? nullptr : mask_type->tp_alloc(mask_type, 2);
  PyObject* result = saved == nullptr ? nullptr : PyTuple_New(2);
  if (result == nullptr) {
    Py_XDECREF(saved);
    Py_XDECREF(order);
    Py_DECREF(mask);
    Py_DECREF(out);
    return nullptr;
  }
#if PY_VERSION_HEX >= 0x030E0000
  reinterpret_cast<PyTupleObject*>(saved)->ob_hash = -1;  // not known, as PyTuple_New has it
#endif
  PyTuple_SET_ITEM(saved, 0, object_of(mask));
  PyTuple_SET_ITEM(saved, 1, order);
  PyTuple_SET_ITEM(result, 0, object_of(out));
  PyTuple_SET_ITEM(result, 1, saved);
  return result;
}

PyObject* forward_with_mask(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("forward_with_mask", count, 4)) return nullptr;
  const Numbers* numbers = numbers_of(args[0]);
  PyArrayObject* x = numbers == nullptr ? nullptr : array_for(numbers, args[1], "x");
  if (x == nullptr) return nullptr;
  if (numbers->dtype >= kFloatingDtypes) {
    PyErr_SetString(PyExc_TypeError, "x must have a floating dtype");
    return nullptr;
  }
  const npy_intp size = PyArray_SIZE(x);
  PyArrayObject* mask;
  if (args[3] == Py_None) {
    npy_intp nbytes = numbers->three_branches != 0 ? size : (size + 7) / 8;
    mask = reinterpret_cast<PyArrayObject*>(PyArray_SimpleNew(1, &nbytes, NPY_UINT8));
  } else {
    mask = mask_array(args[3], numbers, size, true);
    Py_XINCREF(mask);
  }
  if (mask == nullptr) return nullptr;
  PyArrayObject* out = out_array(args[2], x, PyArray_DESCR(x));
  if (out == nullptr) {
    Py_DECREF(mask);
    return nullptr;
  }
  int axes[NPY_MAXDIMS];
  const bool permuted = memory_order(x, axes);
  PyObject* result = forward_result(out, mask, permuted ? axes : nullptr, PyArray_NDIM(x));
  if (result == nullptr) return nullptr;

  Job job;
  job.numbers = job.branches_numbers = numbers;
  job.branches_input = 0;
  job.inputs = 1;
  job.mask = static_cast<unsigned char*>(PyArray_DATA(mask));
  if (numbers->three_branches != 0) {
    job.kernel = floating(numbers, kForward);
    job.branches = floating(numbers, kBranches);
    job.mask_kind = MaskKind::kBytes;
  } else {
    job.kernel = floating(numbers, kForwardBits);
    job.mask_kind = MaskKind::kBits;
  }
  const Source sources[] = {{out, &job.out}, {x, &job.in[0]}};
  lay_out_in_order(job, sources, 2, x, permuted ? axes : nullptr);
  execute(job);
  return result;
}

// Whether `object` is None or a permutation of the axes of `array`, which goes to `axes`.
bool parse_axes(PyObject* object, PyArrayObject* array, int* axes) {
  const int ndim = PyArray_NDIM(array);
  if (object == Py_None) return true;
  bool valid = PyTuple_Check(object) && PyTuple_GET_SIZE(object) == ndim;
  bool seen[NPY_MAXDIMS] = {};
  for (int i = 0; valid && i < ndim; ++i) {
    PyObject* item = PyTuple_GET_ITEM(object, i);
    const long axis = PyLong_Check(item) ? PyLong_AsLong(item) : -1;
    valid = axis >= 0 && axis < ndim && !seen[axis];
    if (valid) {
      axes[i] = static_cast<int>(axis);
      seen[axis] = true;
    }
  }
  if (!valid && !PyErr_Occurred()) {
    PyErr_SetString(PyExc_ValueError, "axes must be None or a permutation of the array's axes");
  }
  return valid;
}

PyObject* backward(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("backward", count, 5)) return nullptr;
  const Numbers* numbers = numbers_of(args[0]);
  PyArrayObject* dy = numbers == nullptr ? nullptr : array_for(numbers, args[1], "dy");
  if (dy == nullptr) return nullptr;
  if (numbers->dtype >= kFloatingDtypes) {
    PyErr_SetString(PyExc_TypeError, "dy must have a floating dtype");
    return nullptr;
  }
  PyArrayObject* mask = mask_array(args[2], numbers, PyArray_SIZE(dy), false);
  int axes[NPY_MAXDIMS];
  if (mask == nullptr || !parse_axes(args[3], dy, axes)) return nullptr;
  PyArrayObject* out = out_array(args[4], dy, PyArray_DESCR(dy));
  if (out == nullptr) return nullptr;
  Job job;
  const bool bits = numbers->three_branches == 0;
  job.kernel = floating(numbers, bits ? kBackwardBits : kBackwardBytes);
  job.numbers = numbers;
  job.inputs = 1;
  job.mask = static_cast<unsigned char*>(PyArray_DATA(mask));
  job.mask_kind = bits ? MaskKind::kBits : MaskKind::kBytes;
  const Source sources[] = {{out, &job.out}, {dy, &job.in[0]}};
  lay_out_in_order(job, sources, 2, dy, args[3] == Py_None ? nullptr : axes);
  execute(job);
  return object_of(out);
}

// With None for dy the gradient of ones, of the dtype of x.
PyObject* backward_from_input(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("backward_from_input", count, 5)) return nullptr;
  const Numbers *numbers = numbers_of(args[0]), *slopes = numbers_of(args[1]);
  if (numbers == nullptr || slopes == nullptr) return nullptr;
  PyArrayObject* x = array_for(numbers, args[3], "x");
  PyArrayObject* dy = args[2] == Py_None ? x : array_for(slopes, args[2], "dy");
  if (x == nullptr || dy == nullptr || !check_shape(dy, x, "dy")) return nullptr;
  if (numbers->dtype >= kFloatingDtypes || slopes->dtype >= kFloatingDtypes ||
      slopes->dtype != dtype_of(dy)) {
    PyErr_SetString(PyExc_TypeError, "x and dy must have floating dtypes, those of their numbers");
    return nullptr;
  }
  PyArrayObject* out = out_array(args[4], x, PyArray_DESCR(dy));
  if (out == nullptr) return nullptr;
  Job job;
  Ones ones;
  job.numbers = slopes;
  if (numbers == slopes) {
    job.kernel = floating(numbers, kBackwardFromInput);
  } else {
    job.kernel = floating(slopes, kBackwardBytes);
    job.branches = floating(numbers, kBranches);
    job.branches_numbers = numbers;
    job.branches_input = 1;
  }
  job.inputs = 2;
  if (args[2] == Py_None) set_ones(ones, slopes->dtype, x, job.in[0]);
  const Source sources[] = {
      {out, &job.out}, {x, &job.in[1]}, {args[2] == Py_None ? nullptr : dy, &job.in[0]}};
  lay_out(job, sources, 3, x);
  execute(job);
  return object_of(out);
}

// Prepares one of the operations without variants over arrays of one dtype.
void prepare_other(Operation operation, int dtype, const Source* sources, int count, Job& job,
                   PyArrayObject* like) {
  job.kernel = other(dtype, operation);
  job.numbers = &kRelu[dtype];
  job.inputs = count - 1;
  lay_out(job, sources, count, like);
}

bool broadcasts(PyArrayObject* array, PyArrayObject* to) {
  bool fits = PyArray_NDIM(array) == PyArray_NDIM(to);
  for (int axis = 0; fits && axis < PyArray_NDIM(to); ++axis) {
    fits = PyArray_DIM(array, axis) == 1 || PyArray_DIM(array, axis) == PyArray_DIM(to, axis);
  }
  if (!fits) PyErr_SetString(PyExc_ValueError, "slopes do not broadcast to the other arrays");
  return fits;
}

// prelu(values, x, slopes, out): values where x is above 0, slopes * values elsewhere. With None
// for values: ones. With None for x: slopes * values, but values where a slope is 1.
PyObject* prelu(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("prelu", count, 4)) return nullptr;
  int dtype;
  int x_dtype;
  int values_dtype;
  PyArrayObject* slopes = floating_array(args[2], "slopes", dtype);
  if (slopes == nullptr) return nullptr;
  PyArrayObject* x = args[1] == Py_None ? nullptr : floating_array(args[1], "x", x_dtype);
  PyArrayObject* values =
      args[0] == Py_None ? nullptr : floating_array(args[0], "values", values_dtype);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (values != nullptr && values_dtype != dtype) {
    PyErr_SetString(PyExc_TypeError, "values and slopes must have one dtype");
    return nullptr;
  }
  PyArrayObject* like = values != nullptr ? values : x != nullptr ? x : slopes;
  if ((x != nullptr && !check_shape(x, like, "x")) || !broadcasts(slopes, like)) return nullptr;
  PyArrayObject* out = out_array(args[3], like, PyArray_DESCR(slopes));
  if (out == nullptr) return nullptr;
  Job job;
  Ones ones;
  if (values == nullptr) set_ones(ones, dtype, like, job.in[0]);
  const bool two_dtypes = x != nullptr && x_dtype != dtype;
  if (two_dtypes) {
    job.branches = floating(&kRelu[x_dtype], kBranches);
    job.branches_numbers = &kRelu[x_dtype];
    job.branches_input = 2;
  }
  const Source sources[] = {
      {out, &job.out}, {values, &job.in[0]}, {slopes, &job.in[1]}, {x, &job.in[2]}};
  const Operation operation = x == nullptr ? kScale : two_dtypes ? kPreluBytes : kPrelu;
  prepare_other(operation, dtype, sources, x == nullptr ? 3 : 4, job, like);
  if (operation == kPrelu && has_channels(job)) job.task = run_channels;
  execute(job);
  return object_of(out);
}

// The operations that take one to three arrays and None or a result: `inputs` of one dtype, then,
// for some, one of bytes.
PyObject* elementwise(Operation operation, const char* name, PyObject* const* args,
                      Py_ssize_t count, int inputs, bool bytes_in, bool bytes_out) {
  const int arrays = inputs + (bytes_in ? 1 : 0);
  if (!check_count(name, count, arrays + 1)) return nullptr;
  int dtype = -1;
  Job job;
  Source sources[kInputs + 1];
  PyArrayObject* like = nullptr;
  for (int i = 0; i < arrays; ++i) {
    int its_dtype = dtype;
    PyArrayObject* array = i < inputs ? floating_array(args[i], "an argument", its_dtype)
                                      : array_of(args[i], "branches");
    if (array == nullptr) return nullptr;
    if (i == 0) {
      like = array;
      dtype = its_dtype;
    }
    if (its_dtype != dtype || (i >= inputs && PyArray_TYPE(array) != NPY_UINT8)) {
      PyErr_SetString(PyExc_TypeError, "the arrays must have one dtype, and branches uint8");
      return nullptr;
    }
    if (!check_shape(array, like, "an argument")) return nullptr;
    sources[i + 1] = {array, &job.in[i]};
  }
  PyArray_Descr* descr = PyArray_DESCR(like);
  PyArray_Descr* byte = PyArray_DescrFromType(NPY_UINT8);
  // A result lies in memory as the last input: as dy, or as the branches do and so as x did.
  PyArrayObject* out = out_array(args[arrays], sources[arrays].array, bytes_out ? byte : descr);
  Py_DECREF(byte);
  if (out == nullptr) return nullptr;
  sources[0] = {out, &job.out};
  prepare_other(operation, dtype, sources, arrays + 1, job, like);
  execute(job);
  return object_of(out);
}

PyObject* squared_relu(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  return elementwise(kSquaredRelu, "squared_relu", args, count, 1, false, false);
}

PyObject* squared_relu_backward(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  return elementwise(kSquaredReluBackward, "squared_relu_backward", args, count, 2, false, false);
}

PyObject* negated_relu(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  return elementwise(kNegatedRelu, "negated_relu", args, count, 1, false, false);
}

PyObject* crelu_branches(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  return elementwise(kCreluBranches, "crelu_branches", args, count, 1, false, true);
}

PyObject* crelu_backward(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  return elementwise(kCreluBackward, "crelu_backward", args, count, 2, true, false);
}

// ---- The gradient of PReLU's slopes -------------------------------------------------------------
//
// A sum in float64 in an order that the shape alone decides, the same as that of
// relu_xp.backends.numpy.slopes_gradient: parts of whole rows of the first axis are summed by
// themselves, axis by axis, and then added in turn.

constexpr npy_intp kPartElements = npy_intp{1} << 16;
constexpr npy_intp kRow = 1024;  // elements that are summed side by side

struct SlopeSum {
  Job inputs;  // dy and x: no kernel, but how they lie in memory
  Kernel dy_to_double;
  Kernel x_to_double;
  int ndim;
  npy_intp shape[NPY_MAXDIMS];
  bool summed[NPY_MAXDIMS];  // axes
  npy_intp rows;             // of the first axis
  npy_intp inner;            // elements of one
  npy_intp step;             // rows of a part
  npy_intp part_sums;        // of a whole part
  double* sums;              // part_sums for each part
  std::atomic<bool> no_memory;
};

// Sums a C-contiguous array along the axes that are summed, in place, and returns how many sums
// there are.
npy_intp reduce(const SlopeSum& sum, npy_intp rows, double* terms) {
  npy_intp outer = 1, inner = rows * sum.inner;
  for (int axis = 0; axis < sum.ndim; ++axis) {
    const npy_intp length = axis == 0 ? rows : sum.shape[axis];
    inner /= length;
    if (!sum.summed[axis]) {
      outer *= length;
      continue;
    }
    for (npy_intp i = 0; i < outer; ++i) {
      double* row = terms + i * length * inner;
      npy_intp rest = length;
      if (inner > 1) {
        for (npy_intp k = 1; k < length; ++k) {
          kernels->add(row, row + k * inner, static_cast<std::size_t>(inner));
        }
      } else {
        if (length > 2 * kRow) {
          for (npy_intp k = kRow; k < length; k += kRow) {
            kernels->add(row, row + k, static_cast<std::size_t>(std::min(kRow, length - k)));
          }
          rest = kRow;
        }
        for (; rest > 1; rest -= rest / 2) {
          const npy_intp half = rest / 2;
          kernels->add(row, row + rest - half, static_cast<std::size_t>(half));
        }
      }
      std::memmove(terms + i * inner, row, static_cast<std::size_t>(inner) * sizeof(double));
    }
  }
  return outer;
}

// Writes the terms of a part.
void write_terms(const SlopeSum& sum, npy_intp first, npy_intp count, double* terms) {
  alignas(64) char buffer[kGathered * sizeof(double)];
  alignas(64) double x[kGathered];
  for (npy_intp done = 0; done < count; done += kGathered) {
    const auto n = static_cast<std::size_t>(std::min<npy_intp>(kGathered, count - done));
    const auto at = static_cast<std::size_t>(first + done);
    Block block{};
    block.count = n;
    block.in[0] = resolve(sum.inputs, sum.inputs.in[0], at, n, buffer);
    block.out = reinterpret_cast<char*>(terms + done);
    sum.dy_to_double(kRelu[0], block);
    block.in[0] = resolve(sum.inputs, sum.inputs.in[1], at, n, buffer);
    block.out = reinterpret_cast<char*>(x);
    sum.x_to_double(kRelu[0], block);
    kernels->slope_terms(terms + done, x, n);
  }
}

void sum_parts(void* context, std::size_t begin, std::size_t end) {
  SlopeSum& sum = *static_cast<SlopeSum*>(context);
  const auto size = static_cast<std::size_t>(sum.step * sum.inner);
  const std::unique_ptr<double[]> terms(new (std::nothrow) double[size]);
  if (terms == nullptr) {
    sum.no_memory = true;
    return;
  }
  for (auto part = static_cast<npy_intp>(begin); part < static_cast<npy_intp>(end); ++part) {
    const npy_intp first = part * sum.step;
    const npy_intp rows = std::min(sum.step, sum.rows - first);
    write_terms(sum, first * sum.inner, rows * sum.inner, terms.get());
    const npy_intp count = reduce(sum, rows, terms.get());
    std::memcpy(sum.sums + part * sum.part_sums, terms.get(),
                static_cast<std::size_t>(count) * sizeof(double));
  }
}

// slopes_gradient(dy, x, shape): the sum of x * dy over what is at or below 0, in float64, of a
// shape that has the length 1 along the axes that are summed.
PyObject* slopes_gradient(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("slopes_gradient", count, 3)) return nullptr;
  int dy_dtype;
  int x_dtype;
  PyArrayObject* dy = floating_array(args[0], "dy", dy_dtype);
  PyArrayObject* x = dy == nullptr ? nullptr : floating_array(args[1], "x", x_dtype);
  if (x == nullptr || !check_shape(dy, x, "dy")) return nullptr;
  PyArray_Dims shape = {nullptr, 0};
  if (PyArray_IntpConverter(args[2], &shape) == 0) return nullptr;
  auto* total =
      reinterpret_cast<PyArrayObject*>(PyArray_ZEROS(shape.len, shape.ptr, NPY_FLOAT64, 0));
  PyDimMem_FREE(shape.ptr);
  if (total == nullptr) return nullptr;
  if (!broadcasts(total, x)) {
    Py_DECREF(total);
    return nullptr;
  }
  if (PyArray_SIZE(x) == 0) return object_of(total);

  SlopeSum sum;
  sum.dy_to_double = other(dy_dtype, kToDouble);
  sum.x_to_double = other(x_dtype, kToDouble);
  sum.ndim = PyArray_NDIM(x);
  sum.rows = sum.ndim == 0 ? 1 : PyArray_DIM(x, 0);
  sum.inner = PyArray_SIZE(x) / sum.rows;
  sum.step = std::min(sum.rows, std::max<npy_intp>(1, kPartElements / sum.inner));
  npy_intp inner_sums = 1;
  for (int axis = 0; axis < sum.ndim; ++axis) {
    sum.shape[axis] = PyArray_DIM(x, axis);
    sum.summed[axis] = PyArray_DIM(total, axis) == 1;
    if (axis > 0) inner_sums *= PyArray_DIM(total, axis);
  }
  const bool rows_summed = sum.ndim > 0 && sum.summed[0];
  sum.part_sums = rows_summed ? inner_sums : sum.step * inner_sums;
  sum.no_memory = false;
  const npy_intp parts = (sum.rows + sum.step - 1) / sum.step;
  sum.sums = static_cast<double*>(
      PyMem_RawMalloc(static_cast<std::size_t>(parts * sum.part_sums) * sizeof(double)));
  if (sum.sums == nullptr) {
    Py_DECREF(total);
    return PyErr_NoMemory();
  }
  const Source sources[] = {{dy, &sum.inputs.in[0]}, {x, &sum.inputs.in[1]}};
  lay_out_in_order(sum.inputs, sources, 2, x, nullptr);

  PyThreadState* state = PyEval_SaveThread();
  const bool large = PyArray_SIZE(x) * static_cast<npy_intp>(sizeof(double)) >= limits.threads;
  ThreadPool* pool = large ? ThreadPool::instance() : nullptr;
  if (pool != nullptr) {
    pool->parallel_for(static_cast<std::size_t>(parts), 1, 1, sum_parts, &sum);
  } else {
    sum_parts(&sum, 0, static_cast<std::size_t>(parts));
  }
  PyEval_RestoreThread(state);

  auto* totals = static_cast<double*>(PyArray_DATA(total));
  for (npy_intp part = 0; part < parts && !sum.no_memory;
       ++part) {  // in order, whichever thread summed it
    const npy_intp first = part * sum.step;
    const npy_intp rows = std::min(sum.step, sum.rows - first);
    double* to = rows_summed ? totals : totals + first * inner_sums;
    kernels->add(to, sum.sums + part * sum.part_sums,
                 static_cast<std::size_t>(rows_summed ? inner_sums : rows * inner_sums));
  }
  PyMem_RawFree(sum.sums);
  if (sum.no_memory) {
    Py_DECREF(total);
    return PyErr_NoMemory();
  }
  return object_of(total);
}

// ---- What Python asks besides -------------------------------------------------------------------

// fits(out, like, other): whether `out` certainly may take a result. All are arrays of one dtype
// and shape, contiguous, and `out` may be written and is the very array `like` or `other`, or no
// memory of theirs.
PyObject* fits(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  if (!check_count("fits", count, 3)) return nullptr;
  PyArrayObject* arrays[3];
  for (int i = 0; i < 3; ++i) {
    if (!PyArray_Check(args[i])) Py_RETURN_FALSE;
    arrays[i] = reinterpret_cast<PyArrayObject*>(args[i]);
    if (!PyArray_ISCARRAY_RO(arrays[i]) || PyArray_DESCR(arrays[i]) != PyArray_DESCR(arrays[0]) ||
        !PyArray_SAMESHAPE(arrays[i], arrays[0])) {
      Py_RETURN_FALSE;
    }
  }
  if (!PyArray_ISWRITEABLE(arrays[0]) || Py_TYPE(args[0]) != Py_TYPE(args[1])) Py_RETURN_FALSE;
  const char* out = PyArray_BYTES(arrays[0]);
  const npy_intp nbytes = PyArray_NBYTES(arrays[0]);
  for (int i = 1; i < 3; ++i) {
    const char* data = PyArray_BYTES(arrays[i]);
    if (args[i] != args[0] && data < out + nbytes && out < data + nbytes) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* get_num_threads(PyObject* /*module*/, PyObject* /*none*/) {
  return PyLong_FromLong(ThreadPool::threads());
}

PyObject* set_num_threads(PyObject* /*module*/, PyObject* number) {
  const long threads = PyLong_AsLong(number);
  if (threads == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (threads < 1 || threads > kMaxThreads) {
    PyErr_Format(PyExc_ValueError, "the number of threads must be from 1 to %d", kMaxThreads);
    return nullptr;
  }
  ThreadPool::set_threads(static_cast<int>(threads));
  Py_RETURN_NONE;
}

PyObject* shut_down(PyObject* /*module*/, PyObject* /*none*/) {
  ThreadPool* pool = ThreadPool::instance();
  PyThreadState* state = PyEval_SaveThread();
  if (pool != nullptr) pool->shut_down();
  PyEval_RestoreThread(state);
  Py_RETURN_NONE;
}

// set_limits(release, threads, stream): bytes of a result; returns what they were before. For
// tests, which send small arrays the way of large ones.
PyObject* set_limits(PyObject* /*module*/, PyObject* args) {
  Py_ssize_t release;
  Py_ssize_t threads;
  Py_ssize_t stream;
  if (PyArg_ParseTuple(args, "nnn", &release, &threads, &stream) == 0) return nullptr;
  return Py_BuildValue("nnn", limits.release.exchange(release), limits.threads.exchange(threads),
                       limits.stream.exchange(stream));
}

// ---- The module ---------------------------------------------------------------------------------

struct InstructionSet {
  const char* name;
  bool available;
  const KernelTable* kernels;
};

#ifdef RELU_XP_X86
// The highest of x86-64-v1 to -v4 that the processor and the system have. GCC 11 and clang 14 do
// not know __builtin_cpu_supports("x86-64-v3"), nor the features that are asked for by number here.
int x86_64_level() {
  __builtin_cpu_init();
  unsigned a, b, d, basic = 0, extended = 0;
  if (__get_cpuid(1, &a, &b, &basic, &d) == 0) return 1;
  if (__get_cpuid(0x80000001, &a, &b, &extended, &d) == 0) return 1;
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  (basic & bit_F16C) != 0 && (basic & bit_MOVBE) != 0 &&
                  (extended & bit_LZCNT) != 0;
  if (!v3) return 2;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : 3;
}
#endif

// Chooses the best instruction set of the processor, or the one that RELU_XP_CPU names.
bool choose_kernels() {
#ifdef RELU_XP_X86
  const int level = x86_64_level();
  const InstructionSet sets[] = {
      {"x86-64-v4", level >= 4, &v4::kernels},
      {"x86-64-v3", level >= 3, &v3::kernels},
      {"x86-64-v2", level >= 2, &v2::kernels},
  };
#else
  const InstructionSet sets[] = {{"baseline", true, &baseline::kernels}};
#endif
  const char* wanted = std::getenv("RELU_XP_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const InstructionSet& set : sets) {
    if (!any && std::strcmp(set.name, wanted) != 0) continue;
    if (set.available) {
      kernels = set.kernels;
      instruction_set = set.name;
      return true;
    }
    if (!any) {
      PyErr_Format(PyExc_ValueError,
                   "RELU_XP_CPU asks for %s, which this processor does not have; unset it", wanted);
      return false;
    }
  }
  if (any) {
    PyErr_SetString(PyExc_ImportError, "this processor is older than x86-64-v2");
  } else {
#ifdef RELU_XP_X86
    PyErr_Format(PyExc_ValueError,
                 "RELU_XP_CPU must be x86-64-v2, x86-64-v3 or x86-64-v4, got '%s'", wanted);
#else
    PyErr_Format(PyExc_ValueError, "RELU_XP_CPU must be baseline on this processor, got '%s'",
                 wanted);
#endif
  }
  return false;
}

template <class Function>
PyCFunction as_function(Function function) noexcept {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"forward", as_function(forward), METH_FASTCALL, nullptr},
    {"forward_with_mask", as_function(forward_with_mask), METH_FASTCALL, nullptr},
    {"backward", as_function(backward), METH_FASTCALL, nullptr},
    {"backward_from_input", as_function(backward_from_input), METH_FASTCALL, nullptr},
    {"prelu", as_function(prelu), METH_FASTCALL, nullptr},
    {"slopes_gradient", as_function(slopes_gradient), METH_FASTCALL, nullptr},
    {"squared_relu", as_function(squared_relu), METH_FASTCALL, nullptr},
    {"squared_relu_backward", as_function(squared_relu_backward), METH_FASTCALL, nullptr},
    {"negated_relu", as_function(negated_relu), METH_FASTCALL, nullptr},
    {"crelu_branches", as_function(crelu_branches), METH_FASTCALL, nullptr},
    {"crelu_backward", as_function(crelu_backward), METH_FASTCALL, nullptr},
    {"fits", as_function(fits), METH_FASTCALL, nullptr},
    {"get_num_threads", get_num_threads, METH_NOARGS, nullptr},
    {"set_num_threads", set_num_threads, METH_O, nullptr},
    {"set_limits", set_limits, METH_VARARGS, nullptr},
    {"shut_down", shut_down, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int initialize(PyObject* module) {
  static_assert(NPY_BYTE_ORDER == NPY_LITTLE_ENDIAN,
                "masks are packed on little-endian processors");
  if (PyArray_ImportNumPyAPI() < 0 || !choose_kernels()) return -1;
  PyObject* mask = PyImport_ImportModule("relu_xp.mask");
  PyObject* type = mask == nullptr ? nullptr : PyObject_GetAttrString(mask, "Mask");
  Py_XDECREF(mask);
  if (type == nullptr) return -1;
  mask_type = reinterpret_cast<PyTypeObject*>(type);
  if (PyModule_AddIntConstant(module, "max_threads", kMaxThreads) < 0) return -1;
  return PyModule_AddStringConstant(module, "instruction_set", instruction_set);
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
