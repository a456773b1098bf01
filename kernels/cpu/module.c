/* The Python module `pitlane.kernels._cpu`: the functions of the files module_<subject>.c. A new file defines `<subject>_methods` and
 * adds its subject to SUBJECTS. */
#include "module.h"

#define SUBJECTS(X) \
    X(attention)    \
    X(fp8)          \
    X(linear)       \
    X(ops)          \
    X(probe)        \
    X(step)

#define DECLARE(subject) extern PyMethodDef subject##_methods[];
SUBJECTS(DECLARE)

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels in C", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) {
    PyObject *created = PyModule_Create(&module);
#define ADD(subject)                                                        \
    if (created && PyModule_AddFunctions(created, subject##_methods) < 0) { \
        Py_DECREF(created);                                                 \
        created = NULL;                                                     \
    }
    SUBJECTS(ADD)
    return created;
}
