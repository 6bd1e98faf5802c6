// What Python hands over: weights packed once, a cache, the rows of a pass. Everything is borrowed, nothing copied.
#pragma once
#include <cstddef>
#include <cstdint>

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// y = x W^T + b. W is stored in blocks of 16 outputs, [outputs / 16][inputs / P][16][P], P = 1, 2, 4 inputs of a
// kind side by side, padded with zeros to whole blocks and to `padded` inputs.
struct Linear {
    int32_t kind;
    int32_t inputs;
    int32_t padded;
    int32_t outputs;
    const void* weight;
    const float* scale;   // int8: of each output
    const int32_t* sums;  // int8: of the weights of each output
    const float* bias;    // or null
};

struct Layer {
    const float* attention_norm;
    const float* query_norm;  // of the heads, or null
    const float* key_norm;
    const float* mlp_norm;
    Linear qkv;
    Linear out;
    Linear gate_up;  // blocks of gate and up take turns
    Linear down;
};

// Decoder layers, and the norm after the last of them (or null). With a join the rows of a pass are pairs, [2 hidden]:
// the first half is normed and the join makes the layers' input of both.
struct Stack {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, layers;
    float eps;
    float rope_scale;
    const float* frequencies;  // [head_dim / 2]
    const float* final_norm;
    const float* join_norm;  // or null: no join
    Linear join;
    const Layer* layer;
};

// keys   [layers][slots][kv_heads][rows / 16][head_dim][16]
// values [layers][slots][kv_heads][rows][head_dim padded to 16], both bf16 (half = 1) or fp32
struct Cache {
    void* keys;
    void* values;
    int32_t slots, rows, half;
};

// The rows of a pass. A row attends to the first `prefix` cache rows of its slot, then to `path` in order; the
// last of these is its own.
struct Rows {
    int32_t count;
    const int32_t* slot;
    const int32_t* prefix;
    const int32_t* path_start;  // [count + 1] into path
    const int32_t* path;
};

// One thread's share of the work: which it is, of how many, and where they wait for one another.
struct Team {
    int thread, threads;
    void* pool;
    void (*wait)(void* pool);
};

constexpr int MOST_TOP = 64;      // that are picked of a row
constexpr int MOST_QUERIES = 12;  // that are attended to together

struct Scratch {
    float* x;         // [count, hidden], residual stream
    float* wide;      // [count, wide_stride]
    void* inputs;     // [count padded to 16, input_stride bytes], what a product reads
    float* scales;    // [count], of int8 inputs
    float* context;   // [count, wide_stride], attention's or the MLP's
    float* angles;    // [count, head_dim], cosines and sines
    float* scores;    // [threads, score_stride]: [MOST_QUERIES, row_scores], then as many sums of values
    size_t wide_stride, input_stride, score_stride, row_scores;
};

struct Kernels {
    void (*pass)(const Stack&, const Cache&, const Rows&, const float* x, Scratch&, float* out, Team);
    void (*linear)(const Linear&, const float* x, int count, Scratch&, float* out, Team);
    void (*top)(const float* x, int count, int columns, int k, float* values, int64_t* indices, float* totals, Team);
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();
