/* The Python module `pitlane.kernels._cpu`. Its functions take addresses and sizes. The Python callers in kernels/ check shapes and
 * dtypes; this file refuses negative sizes, sizes of 0 that a kernel divides by, and null addresses. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "attention_bf16.h"
#include "linear_bf16.h"
#include "linear_int.h"
#include "ops_bf16.h"
#include "probe.h"
#include "step.h"

#define MAX_ARGUMENTS 23

/* Read the first `count` of `all` arguments as integers. On a wrong type or number, sets an exception and returns 0. */
static int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, Py_ssize_t all, int64_t *values) {
    if (given != all) {
        PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", all, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* Returns `holds`; if it is 0, sets an exception with the message. */
static int check(int holds, const char *message) {
    if (!holds)
        PyErr_SetString(PyExc_ValueError, message);
    return holds;
}

static PyObject *call_linear_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 10, 10, v) || !check(has_linear_bf16() && (!v[8] || has_amx_bf16()), "this CPU cannot run it") ||
        !check(v[5] >= 0 && v[6] > 0 && v[7] > 0 && v[7] % (v[8] ? 32 : 2) == 0 && v[9] > 0,
               "needs rows >= 0, outs > 0, ins a multiple of 2 (with AMX of 32), threads > 0") ||
        !check(v[5] == 0 || (v[0] && v[1] && v[3] && (v[4] || v[8] || v[5] == 1)), "an address is 0"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    linear_bf16((uint16_t *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], (uint16_t *)v[3], (uint16_t *)v[4], v[5], v[6], v[7], (int)v[8],
                (int)v[9]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_has_linear_bf16(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(has_linear_bf16());
}

static PyObject *call_has_amx_bf16(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(has_amx_bf16());
}

static PyObject *call_attention_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 17, 18, v) || !check(has_attention_bf16(v[13]), "this CPU cannot run it with heads of this size") ||
        !check(v[9] >= 0 && v[10] >= 0 && v[12] > 0 && v[11] > 0 && v[11] % v[12] == 0 && v[16] > 0,
               "needs num_tasks, num_rows >= 0, heads a multiple of kv_heads, threads > 0"))
        return NULL;
    for (int i = 0; i < 9; i++)
        if (!check(v[i] || v[9] == 0, "an address is 0"))
            return NULL;
    Attention job = {(uint16_t *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], (uint16_t *)v[3], (float *)v[4], (int32_t *)v[5],
                     (int64_t *)v[6], (int64_t *)v[7], (int64_t *)v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], 0, NULL};
    job.scale = (float)PyFloat_AsDouble(args[17]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    attention_bf16(&job, (int)v[16]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_attention_quant(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 23, 24, v) || !check(has_attention_bf16(v[15]), "this CPU cannot run it with heads of this size") ||
        !check(v[11] >= 0 && v[12] >= 0 && v[14] > 0 && v[13] > 0 && v[13] % v[14] == 0 && v[22] > 0,
               "needs num_tasks, num_rows >= 0, heads a multiple of kv_heads, threads > 0") ||
        !check(v[21] == 0 || v[21] == 4 || v[21] == 8, "bits are 8, 4, or 0 for fp8") ||
        !check(v[17] >= v[15] * (v[21] ? v[21] : 8) / 8 + (v[21] ? v[15] / 8 : 0), "rows are too short for heads of this size"))
        return NULL;
    for (int i = 0; i < 11; i++)
        if (!check(v[i] || v[11] == 0, "an address is 0"))
            return NULL;
    Quantized store = {(uint8_t *)v[1], (uint8_t *)v[2], (uint16_t *)v[3], (uint16_t *)v[4], v[17], v[18], v[19], v[20], (int)v[21]};
    Attention job = {(uint16_t *)v[0], NULL, NULL, (uint16_t *)v[5], (float *)v[6], (int32_t *)v[7], (int64_t *)v[8], (int64_t *)v[9],
                     (int64_t *)v[10], v[11], v[12], v[13], v[14], v[15], v[16], 0, 0, &store};
    job.scale = (float)PyFloat_AsDouble(args[23]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    attention_bf16(&job, (int)v[22]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_rms_norm_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 6, 7, v) || !check(has_ops_bf16(), "this CPU cannot run it") ||
        !check(v[3] >= 0 && v[4] > 0 && v[5] > 0, "needs rows >= 0, dim > 0, threads > 0") ||
        !check(v[3] == 0 || (v[0] && v[1] && v[2]), "an address is 0"))
        return NULL;
    float eps = (float)PyFloat_AsDouble(args[6]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    rms_norm_bf16((uint16_t *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], v[3], v[4], eps, (int)v[5]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_silu_mul_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 5, 5, v) || !check(has_ops_bf16(), "this CPU cannot run it") ||
        !check(v[2] >= 0 && v[3] > 0 && v[4] > 0, "needs rows >= 0, dim > 0, threads > 0") ||
        !check(v[2] == 0 || (v[0] && v[1]), "an address is 0"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    silu_mul_bf16((uint16_t *)v[0], (uint16_t *)v[1], v[2], v[3], (int)v[4]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_has_step(PyObject *self, PyObject *dim) {
    (void)self;
    long long size = PyLong_AsLongLong(dim);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(has_step(size));
}

static PyObject *call_step_build(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    const char *fault;
    (void)self;
    if (!read_integers(args, given, 2, 5, v) || !check(v[0] && v[1], "an address is 0"))
        return NULL;
    float eps = (float)PyFloat_AsDouble(args[2]), scale = (float)PyFloat_AsDouble(args[3]), unit = (float)PyFloat_AsDouble(args[4]);
    if (PyErr_Occurred())
        return NULL;
    Program *program = program_built((Shape *)v[0], (Op *)v[1], eps, scale, unit, &fault);
    return check(program != NULL, fault) ? PyLong_FromVoidPtr(program) : NULL;
}

static int are_below(const int64_t *values, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; i++)
        if (values[i] < 0 || values[i] >= limit)
            return 0;
    return 1;
}

static PyObject *call_step_run(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    int done;
    (void)self;
    if (!read_integers(args, given, 2, 2, v) || !check(v[0] && v[1], "an address is 0"))
        return NULL;
    const Step *step = (Step *)v[1];
    if (!check(step->rows > 0 && step->rows <= STEP_MAX_ROWS && step->num_logits >= 0 && step->num_logits <= step->rows &&
                   step->threads > 0 && step->threads <= STEP_MAX_THREADS,
               "needs 0 < rows <= 64, 0 <= num_logits <= rows, 0 < threads <= 128") ||
        !check(are_below((int64_t *)step->positions, step->rows, step->num_positions), "a position has no angles") ||
        !check(are_below((int64_t *)step->logit_rows, step->num_logits, step->rows), "a logit row is not in the batch"))
        return NULL;
    for (int group = 0; group < STEP_MAX_GROUPS; group++)
        if (!check(!step->groups[group].sinks || are_below((int64_t *)step->groups[group].sinks, step->rows, step->num_positions),
                   "a second query has no angles"))
            return NULL;
    Py_BEGIN_ALLOW_THREADS;
    done = program_run((Program *)v[0], step);
    Py_END_ALLOW_THREADS;
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *call_step_free(PyObject *self, PyObject *handle) {
    (void)self;
    Program *program = PyLong_AsVoidPtr(handle);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    program_freed(program);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_step_recomputed(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(step_recomputed());
}

static PyObject *call_head_norm(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 6, 7, v) || !check(has_step(v[5]), "this CPU cannot run it with heads of this size") ||
        !check(v[3] >= 0 && v[4] > 0 && v[0] && v[1] && v[2], "needs addresses, rows >= 0, heads > 0"))
        return NULL;
    float eps = (float)PyFloat_AsDouble(args[6]);
    if (PyErr_Occurred())
        return NULL;
    for (int64_t head = 0; head < v[3] * v[4]; head++)
        turn_head((uint16_t *)v[0] + head * v[5], (uint16_t *)v[2] + head * v[5], v[5], (uint16_t *)v[1] + head % v[4] * v[5], eps,
                  NULL, NULL);
    Py_RETURN_NONE;
}

static PyObject *call_has_ops_bf16(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(has_ops_bf16());
}

static PyObject *call_has_attention_bf16(PyObject *self, PyObject *dim) {
    (void)self;
    long long size = PyLong_AsLongLong(dim);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(has_attention_bf16(size));
}

static PyObject *call_int_linear(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 16, 17, v) || !check(v[6] >= 0 && v[15] > 0, "needs rows >= 0, threads > 0") ||
        !check(v[6] == 0 || (v[0] && v[1] && v[4] && v[5]), "an address is 0"))
        return NULL;
    IntLinear job = {(uint8_t *)v[1], (float *)v[2], (float *)v[3], v[7], v[8], (int)v[9], (int)v[10], (int)v[11], (int)v[12],
                     (int)v[13], (int)v[14], 0};
    job.unit = (float)PyFloat_AsDouble(args[16]);
    const char *fault = int_fault(&job);
    if (PyErr_Occurred() || !check(!fault, fault))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    int_linear(&job, (void *)v[0], (void *)v[4], (void *)v[5], v[6], (int)v[15]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_int_rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 7, 7, v) || !check(v[4] >= 0 && v[5] > 0 && v[6] > 0, "needs count >= 0, outs > 0, ins > 0") ||
        !check(v[4] == 0 || (v[0] && v[1] && v[2] && v[3]), "an address is 0") ||
        !check(are_below((int64_t *)v[2], v[4], v[5]), "an index is not below the number of rows"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    int_rows((uint8_t *)v[0], (float *)v[1], (int64_t *)v[2], (float *)v[3], v[4], v[6]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_int_level(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(int_level());
}

static PyObject *call_read_bytes(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    uint64_t sum;
    (void)self;
    if (!read_integers(args, given, 3, 3, v) || !check(v[0] && v[1] >= 0 && v[2] > 0, "needs an address, size >= 0, threads > 0"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    sum = read_bytes((void *)v[0], (size_t)v[1], (int)v[2]);
    Py_END_ALLOW_THREADS;
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *call_ceiling(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    double seconds, rate;
    (void)self;
    if (!read_integers(args, given, 2, 3, v) || !check(v[0] >= 0 && v[0] < 3 && v[1] > 0, "needs kind 0, 1 or 2, threads > 0"))
        return NULL;
    seconds = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    rate = ceiling((int)v[0], (int)v[1], seconds);
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(rate);
}

static PyMethodDef methods[] = {
    {"read_bytes", (PyCFunction)(void (*)(void))call_read_bytes, METH_FASTCALL, "read_bytes(address, size, threads): see probe.h"},
    {"ceiling", (PyCFunction)(void (*)(void))call_ceiling, METH_FASTCALL, "ceiling(kind, threads, seconds): see probe.h"},
    {"int_linear", (PyCFunction)(void (*)(void))call_int_linear, METH_FASTCALL,
     "int_linear(x, w, scales, bias, y, scratch, rows, outs, ins, bits, group, symmetric, quantized, wide, level, threads, unit): "
     "see linear_int.h"},
    {"int_rows", (PyCFunction)(void (*)(void))call_int_rows, METH_FASTCALL,
     "int_rows(w, scales, index, y, count, outs, ins): see linear_int.h"},
    {"int_level", call_int_level, METH_NOARGS, "The best level of int_linear on this CPU: 0 plain, 1 AVX2, 2 AVX-512 VNNI"},
    {"attention_bf16", (PyCFunction)(void (*)(void))call_attention_bf16, METH_FASTCALL,
     "attention_bf16(q, keys, values, out, partial, slots, tasks, members, rows, num_tasks, num_rows, heads, kv_heads, dim, "
     "q_stride, head_stride, threads, scale): see attention_bf16.h"},
    {"attention_quant", (PyCFunction)(void (*)(void))call_attention_quant, METH_FASTCALL,
     "attention_quant(q, keys, values, open_keys, open_values, out, partial, slots, tasks, members, rows, num_tasks, num_rows, heads, "
     "kv_heads, dim, q_stride, row_bytes, head_stride, open_stride, first_open, bits, threads, scale): see attention_quant.h"},
    {"has_attention_bf16", call_has_attention_bf16, METH_O, "Whether attention_bf16 runs on this CPU with heads of a size"},
    {"linear_bf16", (PyCFunction)(void (*)(void))call_linear_bf16, METH_FASTCALL,
     "linear_bf16(x, w, bias, y, scratch, rows, outs, ins, amx, threads): see linear_bf16.h"},
    {"has_linear_bf16", call_has_linear_bf16, METH_NOARGS, "Whether linear_bf16 runs on this CPU"},
    {"has_amx_bf16", call_has_amx_bf16, METH_NOARGS, "Whether linear_bf16 runs with AMX on this CPU"},
    {"rms_norm_bf16", (PyCFunction)(void (*)(void))call_rms_norm_bf16, METH_FASTCALL,
     "rms_norm_bf16(x, w, y, rows, dim, threads, eps): see ops_bf16.h"},
    {"silu_mul_bf16", (PyCFunction)(void (*)(void))call_silu_mul_bf16, METH_FASTCALL,
     "silu_mul_bf16(x, y, rows, dim, threads): see ops_bf16.h"},
    {"has_ops_bf16", call_has_ops_bf16, METH_NOARGS, "Whether the operations of ops_bf16.h run on this CPU"},
    {"has_step", call_has_step, METH_O, "Whether steps run on this CPU with heads of a size"},
    {"step_build", (PyCFunction)(void (*)(void))call_step_build, METH_FASTCALL,
     "step_build(shape, ops, eps, scale, unit) -> program: see step.h"},
    {"step_run", (PyCFunction)(void (*)(void))call_step_run, METH_FASTCALL, "step_run(program, step): see step.h"},
    {"step_free", call_step_free, METH_O, "step_free(program): wait for late helpers, then free it"},
    {"head_norm", (PyCFunction)(void (*)(void))call_head_norm, METH_FASTCALL,
     "head_norm(x, weight, y, rows, heads, dim, eps): the norm of each head as a step computes it"},
    {"step_recomputed", call_step_recomputed, METH_NOARGS, "How many chunks of this process were computed for a late thread"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels in C", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
