/* What the machine can reach: reads of memory and products in registers. */
#include "module.h"

#include "probe.h"

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

PyMethodDef probe_methods[] = {
    {"read_bytes", (PyCFunction)(void (*)(void))call_read_bytes, METH_FASTCALL, "read_bytes(address, size, threads): see probe.h"},
    {"ceiling", (PyCFunction)(void (*)(void))call_ceiling, METH_FASTCALL, "ceiling(kind, threads, seconds): see probe.h"},
    {NULL, NULL, 0, NULL},
};
