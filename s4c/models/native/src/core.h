// What Python hands over: weights packed once, a cache, the rows of a pass. Everything is borrowed, nothing copied.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// (x A^T) B^T in fp32, what an adapter adds to a product at the rows that a pass names.
struct LowRank {
    int32_t rank;
    const float* down;  // A, [rank, inputs]
    const float* up;    // B transposed, [rank, outputs padded to 16], in the order of the product's blocks
};

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
    const LowRank* low_rank;  // or null
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

// The keys and values of rows of cells, for each of [layers][slots][kv_heads], as tiles take them:
//   fp32             keys [rows / 16][head_dim][16]                      values [rows][head_dim padded to 16]
//   bf16 (half = 1)  keys [rows / 16][head_dim padded to 32, / 2][16][2]  values [head_dim padded to 16, / 16][rows / 2][16][2]
struct Cache {
    void* keys;
    void* values;
    int32_t slots, rows, half;
};

inline size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Where the numbers of one slot and head lie.
struct FloatRows {
    float* keys;
    float* values;
    size_t size, wide;

    FloatRows(const Cache& cache, size_t at, int head_dim)
        : keys(static_cast<float*>(cache.keys)), values(static_cast<float*>(cache.values)), size(static_cast<size_t>(head_dim)),
          wide(round_up(size, 16)) {
        keys += at * static_cast<size_t>(cache.rows) * size;
        values += at * static_cast<size_t>(cache.rows) * wide;
    }
    float* key(size_t row, size_t i) const { return keys + (row / 16 * size + i) * 16 + row % 16; }
    float* value(size_t row, size_t i) const { return values + row * wide + i; }
};

struct HalfRows {
    uint16_t* keys;
    uint16_t* values;
    size_t deep, rows;  // a key with its padding; cells of a block of values

    HalfRows(const Cache& cache, size_t at, int head_dim)
        : keys(static_cast<uint16_t*>(cache.keys)), values(static_cast<uint16_t*>(cache.values)),
          deep(round_up(static_cast<size_t>(head_dim), 32)), rows(static_cast<size_t>(cache.rows)) {
        keys += at * rows * deep;
        values += at * rows * round_up(static_cast<size_t>(head_dim), 16);
    }
    uint16_t* key(size_t row, size_t i) const { return keys + (row / 16 * deep + i / 2 * 2) * 16 + row % 16 * 2 + i % 2; }
    uint16_t* value(size_t row, size_t i) const { return values + (i / 16 * rows + row / 2 * 2) * 16 + i % 16 * 2 + row % 2; }
};

inline size_t place_of(const Cache& cache, int kv_heads, int layer, int slot, int head) {
    size_t line = static_cast<size_t>(layer) * static_cast<size_t>(cache.slots) + static_cast<size_t>(slot);
    return line * static_cast<size_t>(kv_heads) + static_cast<size_t>(head);
}

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
constexpr int MOST_QUERIES = 16;  // that are attended to together

struct Scratch {
    float* x;         // [count, hidden], residual stream
    float* wide;      // [count, wide_stride]
    void* inputs;     // [count padded to 16, input_stride bytes], what a product reads
    float* scales;    // [count], of int8 inputs
    float* context;   // [count, wide_stride], attention's or the MLP's
    float* angles;    // [count, head_dim], cosines and sines
    float* scores;    // [threads, score_stride]: [MOST_QUERIES, row_scores], as many sums of values, and for halves the
                      // queries and their weights once more, 16 rows each
    const uint8_t* adapted;  // [count], whether a row has low-rank terms; or null
    float* inner;            // [count, inner_stride], x A^T of the product at hand
    const int32_t* taps;     // [tap_count] ascending: behind so many layers the residual stream is given out as well
    int32_t tap_count;
    size_t wide_stride, input_stride, score_stride, row_scores, inner_stride;
};

// Embeddings, [tokens, hidden]: bf16 (half = 1) or fp32.
struct Embedding {
    const void* weight;
    int32_t half;

    void read(int64_t token, size_t hidden, float* out) const {
        size_t at = static_cast<size_t>(token) * hidden;
        if (!half) {
            std::memcpy(out, static_cast<const float*>(weight) + at, sizeof(float) * hidden);
            return;
        }
        const uint16_t* bits = static_cast<const uint16_t*>(weight) + at;
        for (size_t i = 0; i < hidden; i++) {
            uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
            std::memcpy(out + i, &wide, sizeof(float));
        }
    }
};

// A whole model.
struct Decoder {
    const Stack* stack;
    const Cache* cache;
    const Linear* lm_head;
    Embedding embedding;
};

// Heads that draft one after the other, each a stack with a join and a cache of its own, and the LM head that they share.
struct Heads {
    int32_t count, products;      // products: of the LM head, one after the other
    const Stack* const* stack;    // [count]
    const Cache* const* cache;    // [count]
    const Linear* const* lm_head;  // [products]
    const int64_t* token_ids;     // [outputs of the LM head], the target's token of each
    Embedding embedding;
};

// The tree that is wanted: children of a node, levels, nodes with the root. Up to `expanded` best nodes of a level have
// children of their own and the best nodes of all are kept (best = 1), or the first node of a level has and all are. Nodes
// of best trees have none where these could not be kept, and a level has none where its paths are together less probable
// than the floor, a logarithm.
struct Plan {
    int32_t best, width, depth, nodes, expanded;
    float floor;
};

// What the heads have not seen yet, padded to the longest; the root is the last of each.
struct Round {
    int32_t batch, longest;
    const int64_t* tokens;      // [batch, longest]
    const int32_t* counts;      // [batch]
    const int32_t* lengths;     // [batch], committed rows of the caches
    const float* const* features;  // [batch], [counts, hidden] each, the target's, one position before each token
    float* const* carry;        // [batch], [count - 1, hidden] each, of heads at the last committed row: read, and brought up to date
    const float* temperatures;  // [batch], 0: greedy
    const float* const* noise;  // [batch, depth], of the tokens of a position; null: none
    const Linear* const* further;  // [batch], rows of the LM head for tokens that this sequence may draft besides; null: none
    const int64_t* const* further_ids;  // [batch], the target's token of each
    const int64_t* const* texts;  // [batch], all that is committed, the root last; null: nothing is echoed
    const int32_t* text_lengths;  // [batch]
    const float* echo;            // [echo_longest], what a place of the text weighs whose last 1 .. echo_longest tokens are those of a path
    int32_t echo_longest;
    int32_t echo_near, echo_telling;  // places further back than that weigh nothing with fewer tokens
};

// Draft trees to be judged, and what their requests ask for.
struct Trees {
    int32_t batch, nodes;
    int32_t levels;               // nodes of the longest path
    const int64_t* tokens;        // [batch, nodes]
    const int64_t* parents;       // [batch, nodes]
    const uint8_t* candidate;     // [batch, nodes]
    const float* temperatures;    // [batch], 0: greedy
    const float* const* noise;    // [batch, levels], of the token after a node of that depth; null: none
};

constexpr int64_t NO_NUMBERS = -1, NOTHING = -2;  // in place of a token: NaN or infinity, or all excluded

struct Kernels {
    void (*pass)(const Stack&, const Cache&, const Rows&, const float* x, Scratch&, float* out, Team);
    void (*linear)(const Linear&, const float* x, size_t stride, int count, Scratch&, float* out, Team);
    void (*top)(const float* x, int count, int columns, int k, float* values, int64_t* indices, float* totals, Team);
    void (*judge)(const Trees&, const float* logits, int columns, int64_t* paths, int64_t* tokens, int64_t* accepted, Team);
    void (*noise)(uint64_t seed, uint32_t stream, uint64_t position, int size, float* out, Team);
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// The interface. What can fail gives -1 where memory ran out.
extern "C" {

// The instruction sets that run here, best first, with commas; into a buffer of `size` bytes.
void s4c_variants(char* out, int size);

// 0, or -1 where that instruction set is not known or does not run here.
int s4c_choose(const char* name);

void s4c_set_threads(int threads);
int s4c_threads();

// x [batch * count, hidden] (twice that with a join) through the layers of a stack, appended to slots first_slot ... of
// the cache behind `pending` uncommitted rows. parents [batch, pending + count]: the uncommitted row before each, -1
// where the committed ones end. adapted [batch * count]: whether a row has low-rank terms; or null. taps [tap_count],
// ascending from 1 to the layers of the stack. out [batch * count, (1 + tap_count) * hidden]: what the layers give, then
// the residual stream behind so many layers.
int s4c_pass(const Stack* stack, const Cache* cache, const float* x, float* out, int batch, int count, int pending,
             int first_slot, const int32_t* lengths, const int64_t* parents, const uint8_t* adapted, const int32_t* taps,
             int tap_count);

// A whole pass over tokens [batch, count]: features [batch * count, (1 + tap_count) * hidden] and logits [batch * count, outputs of
// the LM head]. The rest as for s4c_pass, in the first slots, with nothing pending. -2 where a token is none of the LM head's.
int s4c_verify(const Decoder* decoder, const int64_t* tokens, int batch, int count, const int32_t* lengths, const int64_t* parents,
               const int32_t* taps, int tap_count, float* features, float* logits);

// out [count, outputs] = x [count, inputs] W^T + b.
int s4c_linear(const Linear* linear, const float* x, int count, float* out);

// values, indices [count, k] and totals [count]: the highest numbers of each row of x [count, columns], and the log of the
// sum of its exponentials; k is from 1 to MOST_TOP and no more than columns.
int s4c_top(const float* x, int count, int columns, int k, float* values, int64_t* indices, float* totals);

// The coupled rule (s4c/verify/rules.py). From the root of each tree down the candidates that bear the token chosen above
// them: where the logits [batch, nodes, columns] of a node are highest, divided by the temperature and with the noise added, of
// equals the first. NO_NUMBERS or NOTHING is chosen where there is no law.
// paths, tokens [batch, nodes]: the columns of the accepted nodes, the root first, and the tokens chosen there; the last ones
// are repeated. accepted [batch]. Returns the most accepted nodes of a tree.
int s4c_judge(const Trees* trees, const float* logits, int columns, int64_t* paths, int64_t* tokens, int64_t* accepted);

// out [size]: the Gumbel noise of a row, see s4c/verify/noise.py.
int s4c_noise(uint64_t seed, uint32_t stream, uint64_t position, int size, float* out);

// Moves rows `start + rows[i]` of a slot to `start + i`; rows ascend.
void s4c_keep(const Cache* cache, int layers, int heads, int head_dim, int slot, int start, const int32_t* rows, int count);

// A tree for each sequence: tokens, parents, paths (log-probabilities) and whether a node is a candidate, [batch, size] of room
// for `most` columns; the size, or -1. The rows of the round stand uncommitted in the caches, which have room for them.
int s4c_draft(const Heads* heads, const Plan* plan, const Round* round, int most, int64_t* tokens, int64_t* parents, float* path,
              uint8_t* candidate);

}  // extern "C"
