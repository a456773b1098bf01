/* The operations between the linears in bfloat16. */
#include "module.h"

#include "ops_bf16.h"

static PyObject *call_rms_norm_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 7, 8, v) || !check(has_ops_bf16(), "this CPU cannot run it") ||
        !check(v[3] >= 0 && v[4] > 0 && v[5] > 0, "needs rows >= 0, dim > 0, threads > 0") ||
        !check(v[3] == 0 || (v[0] && v[1] && v[2]), "an address is 0"))
        return NULL;
    float eps = (float)PyFloat_AsDouble(args[7]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    rms_norm_bf16((void *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], v[3], v[4], eps, (int)v[5], v[6] != 0);
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

PyMethodDef ops_methods[] = {
    {"rms_norm_bf16", (PyCFunction)(void (*)(void))call_rms_norm_bf16, METH_FASTCALL,
     "rms_norm_bf16(x, w, y, rows, dim, threads, wide, eps): see ops_bf16.h"},
    {"silu_mul_bf16", (PyCFunction)(void (*)(void))call_silu_mul_bf16, METH_FASTCALL,
     "silu_mul_bf16(x, y, rows, dim, threads): see ops_bf16.h"},
    {"has_ops_bf16", call_has_ops_bf16, METH_NOARGS, "Whether the operations of ops_bf16.h run on this CPU"},
    {NULL, NULL, 0, NULL},
};
