/* Linears: bfloat16 (linear_bf16.h), int8 and int4 (linear_int.h). */
#include "module.h"

#include "linear_bf16.h"
#include "linear_int.h"
#include "vectors.h"

static PyObject *call_linear_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 11, 11, v) ||
        !check(has_products(v[8], v[7]), "this CPU cannot run it, or ins is no multiple of 2 (with AMX of 32)") ||
        !check(v[5] >= 0 && v[6] > 0 && v[9] > 0, "needs rows >= 0, outs > 0, threads > 0") ||
        !check(v[5] == 0 || (v[0] && v[1] && v[3] && (v[4] || !scratch_bytes_bf16((int)v[8], v[5], v[7]))), "an address is 0"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    linear_bf16((uint16_t *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], (void *)v[3], (void *)v[4], v[5], v[6], v[7], (int)v[8],
                (int)v[9], v[10] != 0);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_has_products(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    return read_integers(args, given, 2, 2, v) ? PyBool_FromLong(has_products(v[0], v[1])) : NULL;
}

static PyObject *call_vectors_level(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(vectors_level());
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

PyMethodDef linear_methods[] = {
    {"linear_bf16", (PyCFunction)(void (*)(void))call_linear_bf16, METH_FASTCALL,
     "linear_bf16(x, w, bias, y, scratch, rows, outs, ins, products, threads, wide): see linear_bf16.h"},
    {"has_products", (PyCFunction)(void (*)(void))call_has_products, METH_FASTCALL,
     "has_products(products, ins): whether linear_bf16 runs with these products on this CPU"},
    {"vectors_level", call_vectors_level, METH_NOARGS,
     "The level of the kernels for bfloat16 and of attention on this CPU: 0 there are none, 1 AVX2, 2 AVX-512 BF16"},
    {"int_linear", (PyCFunction)(void (*)(void))call_int_linear, METH_FASTCALL,
     "int_linear(x, w, scales, bias, y, scratch, rows, outs, ins, bits, group, symmetric, quantized, wide, level, threads, unit): "
     "see linear_int.h"},
    {"int_rows", (PyCFunction)(void (*)(void))call_int_rows, METH_FASTCALL,
     "int_rows(w, scales, index, y, count, outs, ins): see linear_int.h"},
    {"int_level", call_int_level, METH_NOARGS, "The best level of int_linear on this CPU: 0 plain, 1 AVX2, 2 AVX-512 VNNI, 3 AMX"},
    {NULL, NULL, 0, NULL},
};
