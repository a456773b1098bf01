#ifndef PITLANE_MODULE_H
#define PITLANE_MODULE_H

/* Functions of the Python module take addresses and sizes. The Python callers in kernels/ check shapes and dtypes; the C functions
 * refuse negative sizes, sizes of 0 that a kernel divides by, and null addresses. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>

#define MAX_ARGUMENTS 23

/* Read the first `count` of `all` arguments as integers. On a wrong type or number, sets an exception and returns 0. */
static inline int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, Py_ssize_t all, int64_t *values) {
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
static inline int check(int holds, const char *message) {
    if (!holds)
        PyErr_SetString(PyExc_ValueError, message);
    return holds;
}

static inline int are_below(const int64_t *values, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; i++)
        if (values[i] < 0 || values[i] >= limit)
            return 0;
    return 1;
}

#endif
