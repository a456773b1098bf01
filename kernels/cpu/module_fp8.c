/* The linear of linear_fp8.h. */
#include "module.h"

#include "linear_fp8.h"

static PyObject *call_fp8_linear(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t v[MAX_ARGUMENTS];
    (void)self;
    if (!read_integers(args, given, 13, 13, v) ||
        !check(v[5] >= 0 && v[6] > 0 && v[7] > 0 && v[7] % 2 == 0 && v[8] > 0 && v[8] % 2 == 0 && v[12] > 0,
               "needs rows >= 0, outs > 0, ins and group even and > 0, threads > 0") ||
        !check(v[11] == FP8_PLAIN || (v[11] == FP8_VECTORS && !v[9] && has_fp8_vectors()), "this CPU cannot run this level") ||
        !check(v[5] == 0 || (v[0] && v[1] && v[2] && v[4]), "an address is 0"))
        return NULL;
    Fp8Linear job = {(uint8_t *)v[1], (float *)v[2], (float *)v[3], v[6], v[7], v[8], (int)v[9], (int)v[10], (int)v[11]};
    Py_BEGIN_ALLOW_THREADS;
    fp8_linear(&job, (void *)v[0], (void *)v[4], v[5], (int)v[12]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *call_has_fp8_vectors(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(has_fp8_vectors());
}

PyMethodDef fp8_methods[] = {
    {"fp8_linear", (PyCFunction)(void (*)(void))call_fp8_linear, METH_FASTCALL,
     "fp8_linear(x, w, scales, bias, y, rows, outs, ins, group, wide, wide_outputs, level, threads): see linear_fp8.h"},
    {"has_fp8_vectors", call_has_fp8_vectors, METH_NOARGS, "Whether fp8_linear runs with vectors on this CPU"},
    {NULL, NULL, 0, NULL},
};
