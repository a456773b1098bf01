/* A step in one call: build, run and free its program. */
#include "module.h"

#include "step.h"
#include "vectors.h"

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

static int has_second_angles(const Step *step) {
    for (int group = 0; group < STEP_MAX_GROUPS; group++)
        if (step->groups[group].second && !are_below((int64_t *)step->groups[group].second, step->rows, step->num_positions))
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
        !check(has_second_angles(step), "a second position has no angles") ||
        !check(are_below((int64_t *)step->logit_rows, step->num_logits, step->rows), "a logit row is not in the batch"))
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
        vectors()->turn_head((uint16_t *)v[0] + head * v[5], (uint16_t *)v[2] + head * v[5], v[5],
                             (uint16_t *)v[1] + head % v[4] * v[5], eps, NULL, NULL);
    Py_RETURN_NONE;
}

PyMethodDef step_methods[] = {
    {"has_step", call_has_step, METH_O, "Whether steps run on this CPU with heads of a size"},
    {"step_build", (PyCFunction)(void (*)(void))call_step_build, METH_FASTCALL,
     "step_build(shape, ops, eps, scale, unit) -> program: see step.h"},
    {"step_run", (PyCFunction)(void (*)(void))call_step_run, METH_FASTCALL, "step_run(program, step): see step.h"},
    {"step_free", call_step_free, METH_O, "step_free(program): wait for late helpers, then free it"},
    {"step_recomputed", call_step_recomputed, METH_NOARGS, "How many chunks of this process were computed for a late thread"},
    {"head_norm", (PyCFunction)(void (*)(void))call_head_norm, METH_FASTCALL,
     "head_norm(x, weight, y, rows, heads, dim, eps): the norm of each head as a step computes it"},
    {NULL, NULL, 0, NULL},
};
