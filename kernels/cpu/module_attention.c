/* Attention over paged KV in bfloat16 and in the formats of quantized KV. */
#include "module.h"

#include "attention_bf16.h"

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

static PyObject *call_has_attention_bf16(PyObject *self, PyObject *dim) {
    (void)self;
    long long size = PyLong_AsLongLong(dim);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(has_attention_bf16(size));
}

PyMethodDef attention_methods[] = {
    {"attention_bf16", (PyCFunction)(void (*)(void))call_attention_bf16, METH_FASTCALL,
     "attention_bf16(q, keys, values, out, partial, slots, tasks, members, rows, num_tasks, num_rows, heads, kv_heads, dim, "
     "q_stride, head_stride, threads, scale): see attention_bf16.h"},
    {"attention_quant", (PyCFunction)(void (*)(void))call_attention_quant, METH_FASTCALL,
     "attention_quant(q, keys, values, open_keys, open_values, out, partial, slots, tasks, members, rows, num_tasks, num_rows, heads, "
     "kv_heads, dim, q_stride, row_bytes, head_stride, open_stride, first_open, bits, threads, scale): see attention_quant.h"},
    {"has_attention_bf16", call_has_attention_bf16, METH_O, "Whether attention_bf16 runs on this CPU with heads of a size"},
    {NULL, NULL, 0, NULL},
};
