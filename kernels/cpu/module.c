/* The Python module `pitlane.kernels._cpu`. Its functions take addresses and sizes. The Python callers in kernels/ check shapes and
 * dtypes; this file refuses negative sizes, sizes of 0 that a kernel divides by, and null addresses. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "attention_bf16.h"
#include "linear_bf16.h"
#include "linear_int.h"
#include "ops_bf16.h"
#include "probe.h"

#define MAX_ARGUMENTS 17

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
                     (int64_t *)v[6], (int64_t *)v[7], (int64_t *)v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], 0};
    job.scale = (float)PyFloat_AsDouble(args[17]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    attention_bf16(&job, (int)v[16]);
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
    if (!read_integers(args, given, 16, 17, v) ||
        !check(v[6] >= 0 && v[7] > 0 && v[8] > 0 && v[8] <= MAX_INT_INPUTS && v[15] > 0,
               "needs rows >= 0, outs > 0, 0 < ins <= 2^20, threads > 0") ||
        !check((v[10] == 32 || v[10] == 64 || v[10] == 128) && (v[9] == 8 ? v[2] != 0 : v[9] == 4 && v[8] % v[10] == 0),
               "needs a group of 32, 64 or 128, and bits = 8 and scales, or bits = 4 and a group that divides ins") ||
        !check(v[14] >= 0 && v[14] <= int_level(), "this CPU cannot run this level") ||
        !check(v[6] == 0 || (v[0] && v[1] && v[4] && v[5]), "an address is 0"))
        return NULL;
    IntLinear job = {(uint8_t *)v[1], (float *)v[2], (float *)v[3], v[7], v[8], (int)v[9], (int)v[10], (int)v[11], (int)v[12],
                     (int)v[13], (int)v[14], 0};
    job.unit = (float)PyFloat_AsDouble(args[16]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    int_linear(&job, (void *)v[0], (void *)v[4], (void *)v[5], v[6], (int)v[15]);
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
    {"int_level", call_int_level, METH_NOARGS, "The best level of int_linear on this CPU: 0 plain, 1 AVX2, 2 AVX-512 VNNI"},
    {"attention_bf16", (PyCFunction)(void (*)(void))call_attention_bf16, METH_FASTCALL,
     "attention_bf16(q, keys, values, out, partial, slots, tasks, members, rows, num_tasks, num_rows, heads, kv_heads, dim, "
     "q_stride, head_stride, threads, scale): see attention_bf16.h"},
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
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels in C", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
