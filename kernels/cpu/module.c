/* The Python module `pitlane.kernels._cpu`: kernels take addresses and sizes; their callers in kernels/ check shapes and dtypes. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "linear_bf16.h"

#define MOST_ARGUMENTS 16

/* Addresses and sizes from a call's arguments; 0 with an exception set if one is no integer or their number is not `count`. */
static int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, int64_t *values) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "takes %zd integers, got %zd", count, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

static PyObject *call_linear_bf16(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MOST_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 9, v))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    linear_bf16((uint16_t *)v[0], (uint16_t *)v[1], (uint16_t *)v[2], (uint16_t *)v[3], (uint16_t *)v[4], v[5], v[6], v[7], (int)v[8]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_has_linear_bf16(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(has_linear_bf16());
}

static PyMethodDef methods[] = {
    {"linear_bf16", (PyCFunction)(void (*)(void))call_linear_bf16, METH_FASTCALL,
     "linear_bf16(x, w, bias, y, scratch, rows, outs, ins, threads): see linear_bf16.h"},
    {"has_linear_bf16", call_has_linear_bf16, METH_NOARGS, "Whether linear_bf16 runs on this CPU"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels in C", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
