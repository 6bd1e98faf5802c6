// A pass through decoder layers, compiled once for each instruction set (S4C_VARIANT names it).
//
// Batch invariance: what a row gets depends on its own numbers alone. Every output of a product is one sum over
// the inputs in order; norms sum in sixteen fixed lanes; attention reduces over the logical positions of the row
// (its prefix, then its path), wherever in the cache they lie. Threads and tiles split outputs and rows, never a
// sum, so neither the number of rows, their neighbours, the chunk nor the threads can change a bit.
#include "core.h"
#include "noise.h"
#include "simd.h"

#include <type_traits>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace {

constexpr int BLOCK = 16;  // outputs that stand side by side
constexpr int GROUP = 4;   // blocks that a thread multiplies at once
constexpr int BAND = 48;   // rows whose sums are kept at a time, whole tiles of any height
// For each kind of weights the rows of a tile, and those that are no more than one tile is made for; and how many vectors
// of sums the registers hold beside weights and inputs.
#if defined(__AVX512F__)
constexpr int TILE_ROWS[] = {9, 9, 9}, ONLY_ROWS[] = {15, 15, 15}, REGISTERS = 30;
#elif defined(__AVX2__)
constexpr int TILE_ROWS[] = {6, 5, 4}, ONLY_ROWS[] = {6, 5, 4}, REGISTERS = 5;
#else
constexpr int TILE_ROWS[] = {3, 3, 3}, ONLY_ROWS[] = {3, 3, 3}, REGISTERS = 6;
#endif
constexpr int TALLEST = ONLY_ROWS[FLOAT32];
// How many bytes of the weights of a block a single tile fetches early, and into which cache; how many of those it then fetches
// into the first, where that cannot wait for as many lines at a time as the second; how many tile registers.
#if defined(__AVX512BF16__) && !defined(S4C_AMX)
constexpr int AHEAD = 6144, NEAR = 2, CLOSE = 1024;
#elif defined(__AVX512F__)
constexpr int AHEAD = 2048, NEAR = 3, CLOSE = 0, TILES_AHEAD = 4;
#else
constexpr int AHEAD = 3072, NEAR = 2, CLOSE = 0;
#endif

struct Span {
    int begin, end;
};

inline Span share(int count, const Team& team) {
    auto part = [&](int t) { return static_cast<int>(static_cast<int64_t>(count) * t / team.threads); };
    return {part(team.thread), part(team.thread + 1)};
}

inline void wait(const Team& team) {
    if (team.threads > 1) team.wait(team.pool);
}

inline int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

// ---------------------------------------------------------------------------------------------- inputs of products

#if defined(__AVX512BF16__)
inline void to_bf16_row(const float* x, int size, int full, uint16_t* out) {
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(load(x + i)));
    for (; i < size; i++) out[i] = to_bf16(x[i]);
    for (; i < full; i++) out[i] = 0;
}
using Half = uint16_t;
#else
// Rounded, but left as wide as they are: that is how the products take them.
inline void to_bf16_row(const float* x, int size, int full, float* out) {
    for (int i = 0; i < size; i++) out[i] = bf16_value(to_bf16(x[i]));
    for (int i = size; i < full; i++) out[i] = 0;
}
using Half = float;
#endif

constexpr int SPREAD = 64;  // inputs of int8 that are spread over one another, see linear.py

// A block of inputs times the Hadamard matrix of that size; zeros stand behind the last input.
inline void spread(const float* x, int count, vf* out) {
    float buffer[SPREAD];
    if (count < SPREAD) {
        std::memset(buffer, 0, sizeof(buffer));
        std::memcpy(buffer, x, sizeof(float) * static_cast<size_t>(count));
        x = buffer;
    }
    vf v[4];
    for (int i = 0; i < 4; i++) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i * LANES)))));
    vf a = add(v[0], v[1]), b = sub(v[0], v[1]), c = add(v[2], v[3]), d = sub(v[2], v[3]);
    out[0] = add(a, c), out[1] = add(b, d), out[2] = sub(a, c), out[3] = sub(b, d);
}

// Symmetric int8 of the spread inputs with a scale of the row's own, which is NaN where an input is NaN or infinite.
inline float to_int8_row(const float* x, int size, int8_t* out) {
    vf most = zero(), nothing = zero(), block[4];
    auto blocks = [&](auto use) {
        for (int i = 0; i < size; i += SPREAD) {
            spread(x + i, size - i < SPREAD ? size - i : SPREAD, block);
            for (int j = 0; j < 4; j++) use(i + j * LANES, block[j]);
        }
    };
    blocks([&](int, vf values) {
        most = maximum(most, absolute(values));
        nothing = fma(values, zero(), nothing);
    });
    float top = max_lanes(most) + sum_lanes(nothing);
    float inverse = top > 0 ? 127.0f / top : 0.0f;
    blocks([&](int i, vf values) { store_bytes(out + i, nearest(mul(values, set1(inverse)))); });
    return top / 127.0f;
}

// The low-rank term of a product at a row; null where it has none.
inline const LowRank* term_of(const Linear& linear, int row, const Scratch& s) {
    return s.adapted && s.adapted[row] ? linear.low_rank : nullptr;
}

float dot(const float* a, const float* b, int size) {
    vf sums = zero();
    int i = 0;
    for (; i + LANES <= size; i += LANES) sums = fma(load(a + i), load(b + i), sums);
    float sum = sum_lanes(sums);
    for (; i < size; i++) sum += a[i] * b[i];
    return sum;
}

// Turns fp32 rows into what the product reads, and what its low-rank term reads.
void prepare_row(const Linear& linear, const float* x, int row, Scratch& s) {
    char* out = static_cast<char*>(s.inputs) + s.input_stride * static_cast<size_t>(row);
    if (linear.kind == FLOAT32) {
        std::memcpy(out, x, sizeof(float) * static_cast<size_t>(linear.inputs));
    } else if (linear.kind == BFLOAT16) {
        to_bf16_row(x, linear.inputs, linear.padded, reinterpret_cast<Half*>(out));
    } else {
        s.scales[row] = to_int8_row(x, linear.inputs, reinterpret_cast<int8_t*>(out));
    }
    if (const LowRank* term = term_of(linear, row, s)) {
        float* inner = s.inner + s.inner_stride * static_cast<size_t>(row);
        for (int j = 0; j < term->rank; j++)
            inner[j] = dot(term->down + static_cast<size_t>(linear.inputs) * static_cast<size_t>(j), x, linear.inputs);
    }
}

void prepare(const Linear& linear, const float* x, size_t stride, int count, Scratch& s, const Team& team) {
    Span rows = share(count, team);
    for (int r = rows.begin; r < rows.end; r++) prepare_row(linear, x + stride * static_cast<size_t>(r), r, s);
    wait(team);
}

// ------------------------------------------------------------------------------------------------------- products

// Each tile is a function of its own: where they are inlined into one, registers run short. Loops over its sums are flat,
// and unrolled, for then the compiler keeps the sums in registers.
#define ALONE __attribute__((noinline))
#define UNROLLED _Pragma("GCC unroll 64")

// Weights that are wanted soon, so that memory streams while sums are made: a tile fetches `step` bytes of each block for
// every vector of weights that it uses.
struct Soon {
    const char* at;
    int step;
    size_t block;
    int last;     // from here on what comes soon lies in the blocks that are used next,
    size_t jump;  // so far behind

    void fetch(int b, int used) const {
        const char* line = at + block * static_cast<size_t>(b) + used * step;
        __builtin_prefetch(line + (used >= last ? jump : 0), 0, NEAR);
        if (CLOSE && step == 64) __builtin_prefetch(line - AHEAD + CLOSE, 0, 3);
    }
};

// A tile is the products of R rows with B blocks, [R][GROUP * BLOCK]; `steps` are vectors of weights of a block.

template <int R, int B>
ALONE void tile_fp32(const float* w, size_t block, int steps, const char* x, size_t stride, Soon soon, float* out) {
    vf sums[R * B];
    UNROLLED for (int i = 0; i < R * B; i++) sums[i] = zero();
    for (int k = 0; k < steps; k++) {
        auto weights = [&](int b) { return w + block * static_cast<size_t>(b) + static_cast<size_t>(k) * BLOCK; };
        auto input = [&](int r) { return reinterpret_cast<const float*>(x + stride * static_cast<size_t>(r))[k]; };
        for (int b = 0; b < B; b++) soon.fetch(b, k);
        UNROLLED for (int i = 0; i < R * B; i++) sums[i] = fma(load(weights(i % B)), set1(input(i / B)), sums[i]);
    }
    UNROLLED for (int i = 0; i < R * B; i++) store(out + (i / B * GROUP + i % B) * BLOCK, sums[i]);
}

#if !defined(S4C_AMX)

template <int R, int B>
ALONE void tile_bf16(const uint16_t* w, size_t block, int steps, const char* x, size_t stride, Soon soon, float* out) {
    vf sums[R * B];
    UNROLLED for (int i = 0; i < R * B; i++) sums[i] = zero();
    for (int k = 0; k < steps; k++) {
        auto weights = [&](int b) { return w + block * static_cast<size_t>(b) + static_cast<size_t>(k) * 2 * BLOCK; };
        auto inputs = [&](int r) { return reinterpret_cast<const Half*>(x + stride * static_cast<size_t>(r)) + 2 * k; };
        for (int b = 0; b < B; b++) soon.fetch(b, k);
#if defined(__AVX512BF16__)
        UNROLLED for (int i = 0; i < R * B; i++) sums[i] = add_pair_products(_mm512_loadu_si512(weights(i % B)), inputs(i / B), sums[i]);
#else
        UNROLLED for (int i = 0; i < R * B; i++) sums[i] = fma(even_halves(weights(i % B)), set1(inputs(i / B)[0]), sums[i]);
        UNROLLED for (int i = 0; i < R * B; i++) sums[i] = fma(odd_halves(weights(i % B)), set1(inputs(i / B)[1]), sums[i]);
#endif
    }
    UNROLLED for (int i = 0; i < R * B; i++) store(out + (i / B * GROUP + i % B) * BLOCK, sums[i]);
}

// A vector of weights holds those of four inputs for each of sixteen outputs. Integer sums are exact, so every instruction
// set gives the same ones.
template <int R, int B>
ALONE void tile_int8(const int8_t* w, size_t block, int steps, const char* x, size_t stride, Soon soon,
                     const int32_t* weight_sums, int32_t* out) {
    vi sums[R * B];
    UNROLLED for (int i = 0; i < R * B; i++) sums[i] = first_sums(weight_sums + i % B * BLOCK);
    for (int k = 0; k < steps; k++) {
        auto weights = [&](int b) {
            return reinterpret_cast<const int32_t*>(w + block * static_cast<size_t>(b) + static_cast<size_t>(k) * 4 * BLOCK);
        };
        auto four = [&](int r) { return reinterpret_cast<const int32_t*>(x + stride * static_cast<size_t>(r))[k]; };
        for (int b = 0; b < B; b++) soon.fetch(b, k);
        UNROLLED for (int i = 0; i < R * B; i++) sums[i] = add_products(load(weights(i % B)), four(i / B), sums[i]);
    }
    UNROLLED for (int i = 0; i < R * B; i++) store(out + (i / B * GROUP + i % B) * BLOCK, sums[i]);
}

#else

// Tile registers hold sixteen rows by four blocks; the inputs are padded to whole tiles. Both kinds of weights come in
// tiles of 1024 bytes, and meet 64 bytes of each row.
struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define S4C_MULTIPLY(sums, x, w)                       \
    if constexpr (KIND == BFLOAT16) {                  \
        _tile_dpbf16ps(sums, x, w);                    \
    } else {                                           \
        _tile_dpbssd(sums, x, w);                      \
    }

// With a `jump`, to the blocks that are used next, weights are fetched early.
template <Kind KIND, int B>
inline void tile_registers(const char* w, size_t block, int steps, const char* x, size_t stride, float* out, size_t jump = 0) {
    _tile_zero(0);
    if (B > 1) _tile_zero(1);
    if (B > 2) _tile_zero(2);
    if (B > 3) _tile_zero(3);
    for (int k = 0; k < steps; k++, w += 1024, x += 64) {
        if (jump) {
            const char* soon = w + TILES_AHEAD * 1024 + (k >= steps - TILES_AHEAD ? jump : 0);
            UNROLLED for (int i = 0; i < 16 * B; i++)
                __builtin_prefetch(soon + block * static_cast<size_t>(i / 16) + i % 16 * 64, 0, NEAR);
        }
        _tile_loadd(4, x, static_cast<long>(stride));
        _tile_loadd(5, w, 64);
        S4C_MULTIPLY(0, 4, 5);
        if (B > 1) {
            _tile_loadd(6, w + block, 64);
            S4C_MULTIPLY(1, 4, 6);
        }
        if (B > 2) {
            _tile_loadd(5, w + 2 * block, 64);
            S4C_MULTIPLY(2, 4, 5);
        }
        if (B > 3) {
            _tile_loadd(6, w + 3 * block, 64);
            S4C_MULTIPLY(3, 4, 6);
        }
    }
    constexpr long row = GROUP * BLOCK * sizeof(float);
    _tile_stored(0, out, row);
    if (B > 1) _tile_stored(1, out + BLOCK, row);
    if (B > 2) _tile_stored(2, out + 2 * BLOCK, row);
    if (B > 3) _tile_stored(3, out + 3 * BLOCK, row);
}

#endif

// What becomes of a product. What is long, the MLP's (SWIGLU) and what leaves the core (OUT), goes past the caches.
enum class Into { SET, ADD, SWIGLU, OUT };

inline vf silu(vf x) { return div(x, add(set1(1.0f), exponential(sub(zero(), x)))); }

// Scale, bias, low-rank term, and where the sums of one row go.
inline void finish(const Linear& linear, const float* sums, int row, int first_block, int blocks, const Scratch& s, Into into,
                   float* y) {
    const LowRank* term = term_of(linear, row, s);
    auto output = [&](int b) {
        const float* at = sums + b * BLOCK;
        int first = (first_block + b) * BLOCK;
        vf value = linear.kind == INT8 ? mul(to_float(load(reinterpret_cast<const int32_t*>(at))), mul(set1(s.scales[row]), load(linear.scale + first)))
                                       : load(at);
        if (linear.bias) value = add(value, load(linear.bias + first));
        for (int j = 0; term && j < term->rank; j++) {
            float inner = s.inner[s.inner_stride * static_cast<size_t>(row) + static_cast<size_t>(j)];
            value = fma(load(term->up + static_cast<size_t>(padded(linear.outputs)) * static_cast<size_t>(j) + first), set1(inner), value);
        }
        return value;
    };
    if (into == Into::SWIGLU) {
        for (int b = 0; b < blocks; b += 2) stream(y + (first_block + b) / 2 * BLOCK, mul(silu(output(b)), output(b + 1)));
        return;
    }
    for (int b = 0; b < blocks; b++) {
        float* at = y + (first_block + b) * BLOCK;
        int left = linear.outputs - (first_block + b) * BLOCK;
        if (left >= BLOCK) {
            if (into == Into::OUT) stream(at, output(b));
            else store(at, into == Into::ADD ? add(load(at), output(b)) : output(b));
            continue;
        }
        float last[BLOCK];
        store(last, output(b));
        for (int o = 0; o < left; o++) at[o] = into == Into::ADD ? at[o] + last[o] : last[o];
    }
}

struct Tile {
    int block, row, rows;  // which blocks and rows, and how many rows
    int turn, turns;       // which of the tiles that use these weights
    int group;             // blocks until the weights that are used next
};

#if defined(S4C_AMX)
template <int B>
inline void tile_amx(const Linear& linear, const Tile& at, const Scratch& s, float* out) {
    size_t row = static_cast<size_t>(linear.padded) * (linear.kind == BFLOAT16 ? 2 : 1), block = row * BLOCK;
    const char* w = static_cast<const char*>(linear.weight) + block * static_cast<size_t>(at.block);
    const char* x = static_cast<const char*>(s.inputs) + s.input_stride * static_cast<size_t>(at.row);
    int steps = static_cast<int>(row / 64);
    size_t jump = at.turn == 0 ? block * static_cast<size_t>(at.group - 1) : 0;
    if (linear.kind == BFLOAT16) tile_registers<BFLOAT16, B>(w, block, steps, x, s.input_stride, out, jump);
    else tile_registers<INT8, B>(w, block, steps, x, s.input_stride, out, jump);
}
#endif

// The only tile of its weights fetches what it will come to itself, several tiles share what comes after them.
inline Soon soon_after(const Tile& at, const char* weights, size_t block, int steps) {
    if (at.turns == 1) return {weights + AHEAD, 64, block, steps - AHEAD / 64, block * static_cast<size_t>(at.group - 1)};
    int step = at.turns < 64 ? 64 / at.turns : 1;
    return {weights + block * static_cast<size_t>(at.group) + at.turn * steps * step, step, block, steps, 0};
}

template <int R, int B>
inline void tile(const Linear& linear, const Tile& at, const Scratch& s, float* out) {
    const char* x = static_cast<const char*>(s.inputs) + s.input_stride * static_cast<size_t>(at.row);
    size_t block = static_cast<size_t>(linear.padded) * BLOCK;  // in weights
    int width = linear.kind == FLOAT32 ? 4 : linear.kind == BFLOAT16 ? 2 : 1, steps = linear.padded * width / 4;
    size_t bytes = block * static_cast<size_t>(width);
    const char* w = static_cast<const char*>(linear.weight) + bytes * static_cast<size_t>(at.block);
    Soon soon = soon_after(at, w, bytes, steps);
    if (linear.kind == FLOAT32) return tile_fp32<R, B>(reinterpret_cast<const float*>(w), block, steps, x, s.input_stride, soon, out);
#if !defined(S4C_AMX)
    const int32_t* sums = linear.sums + at.block * BLOCK;
    if (linear.kind == BFLOAT16) return tile_bf16<R, B>(reinterpret_cast<const uint16_t*>(w), block, steps, x, s.input_stride, soon, out);
    tile_int8<R, B>(reinterpret_cast<const int8_t*>(w), block, steps, x, s.input_stride, soon, sums, reinterpret_cast<int32_t*>(out));
#endif
}

template <int B, int R = TALLEST>
inline void tile_of(const Linear& linear, const Tile& at, const Scratch& s, float* out) {
#if defined(S4C_AMX)
    if (linear.kind != FLOAT32) return tile_amx<B>(linear, at, s, out);
#endif
    if constexpr (R > 1) {
        if (at.rows < R) return tile_of<B, R - 1>(linear, at, s, out);
    }
    if constexpr (B == 1 || R * B <= REGISTERS) tile<R, B>(linear, at, s, out);
}

#if defined(S4C_AMX)
inline bool in_tile_registers(const Linear& linear) { return linear.kind != FLOAT32; }
#else
inline bool in_tile_registers(const Linear&) { return false; }
#endif

// How a product is cut into tiles: rows and blocks of one, and blocks that are finished together.
struct Cut {
    int height, width, group;

    Cut(const Linear& linear, int count, Into into) {
        height = in_tile_registers(linear) ? 16 : count <= ONLY_ROWS[linear.kind] ? ONLY_ROWS[linear.kind] : TILE_ROWS[linear.kind];
        int rows = count < height ? count : height;
        width = in_tile_registers(linear) || rows * GROUP <= REGISTERS ? GROUP : rows <= REGISTERS ? REGISTERS / rows : 1;
        group = width;
        if (into == Into::SWIGLU && width % 2) group = width > 1 ? --width : 2;
    }

    // The rows of a tile, of a number of rows: tile registers take whole tiles, other tiles share the rows evenly.
    Span span(const Linear& linear, int tile, int tiles, int rows) const {
        if (!in_tile_registers(linear)) return {rows * tile / tiles, rows * (tile + 1) / tiles};
        return {tile * height, (tile + 1) * height < rows ? (tile + 1) * height : rows};
    }
};

// Prepared rows times one matrix. A thread takes a run of blocks, a group of them at a time; bands of rows pass by.
void product(const Linear& linear, int count, const Scratch& s, Into into, float* y, size_t stride, const Team& team) {
    int blocks = (linear.outputs + BLOCK - 1) / BLOCK;
    Span mine = share(into == Into::SWIGLU ? blocks / 2 : blocks, team);
    if (into == Into::SWIGLU) mine = {mine.begin * 2, mine.end * 2};
    alignas(64) float sums[BAND * GROUP * BLOCK];
    Cut cut(linear, count, into);
    for (int block = mine.begin, now; block < mine.end; block += now) {
        now = mine.end - block < cut.group ? mine.end - block : cut.group;
        for (int top = 0; top < count; top += BAND) {
            int rows = count - top < BAND ? count - top : BAND;
            int tiles = (rows + cut.height - 1) / cut.height;
            for (int b = 0, wide; b < now; b += wide) {
                wide = now - b < cut.width ? now - b : cut.width;
                for (int t = 0; t < tiles; t++) {
                    Span span = cut.span(linear, t, tiles, rows);
                    Tile at{block + b, top + span.begin, span.end - span.begin, t, tiles, wide};
                    float* out = sums + (span.begin * GROUP + b) * BLOCK;
                    if (wide == 4) tile_of<4>(linear, at, s, out);
                    else if (wide == 3) tile_of<3>(linear, at, s, out);
                    else if (wide == 2) tile_of<2>(linear, at, s, out);
                    else tile_of<1>(linear, at, s, out);
                }
            }
            for (int r = 0; r < rows; r++) {
                float* line = y + stride * static_cast<size_t>(top + r);
                finish(linear, sums + r * GROUP * BLOCK, top + r, block, now, s, into, line);
            }
        }
    }
    drain();
    wait(team);
}

// ------------------------------------------------------------------------------------------- norms, rotary, cache

void norm_row(const float* x, const float* weight, int size, float eps, float* out) {
    vf squares = zero();
    int whole = size / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        vf v = load(x + i);
        squares = fma(v, v, squares);
    }
    float sum = sum_lanes(squares);
    for (int i = whole; i < size; i++) sum += x[i] * x[i];
    float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
    for (int i = 0; i < whole; i += LANES) store(out + i, mul(mul(load(x + i), set1(scale)), load(weight + i)));
    for (int i = whole; i < size; i++) out[i] = x[i] * scale * weight[i];
}

void norm_rows(const Linear& next, const float* x, const float* weight, int size, float eps, int count, Scratch& s,
               const Team& team) {
    Span rows = share(count, team);
    for (int r = rows.begin; r < rows.end; r++) {
        float* normed = s.context + s.wide_stride * static_cast<size_t>(r);
        norm_row(x + static_cast<size_t>(size) * static_cast<size_t>(r), weight, size, eps, normed);
        prepare_row(next, normed, r, s);
    }
    wait(team);
}

inline void rotate(float* head, const float* angles, int head_dim) {
    int half = head_dim / 2;
    const float *cosine = angles, *sine = angles + half;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

inline void put(float* cell, float x) { *cell = x; }
inline void put(uint16_t* cell, float x) { *cell = to_bf16(x); }

// Norms and rotation of heads; keys and values go into the cache. Threads share out heads, not rows, for rows lie side by
// side there: no two threads write to the same cache line.
template <class Place>
void place_heads(const Stack& stack, const Layer& layer, int index, const Cache& cache, const Rows& rows, Scratch& s, const Team& team) {
    int size = stack.head_dim;
    auto head_of = [&](int r, int h) { return s.wide + s.wide_stride * static_cast<size_t>(r) + static_cast<size_t>(h * size); };
    auto turn = [&](int r, int h, const float* weight) {
        if (weight) norm_row(head_of(r, h), weight, size, stack.eps, head_of(r, h));
        rotate(head_of(r, h), s.angles + static_cast<size_t>(size) * static_cast<size_t>(r), size);
    };
    Span queries = share(stack.heads, team), cells = share(2 * stack.kv_heads, team);
    for (int h = queries.begin; h < queries.end; h++)
        for (int r = 0; r < rows.count; r++) turn(r, h, layer.query_norm);
    for (int c = cells.begin; c < cells.end; c++) {
        int kv = c / 2, h = stack.heads + kv + c % 2 * stack.kv_heads;
        for (int r = 0; r < rows.count; r++) {
            if (c % 2 == 0) turn(r, h, layer.key_norm);
            Place at(cache, place_of(cache, stack.kv_heads, index, rows.slot[r], kv), size);
            size_t row = static_cast<size_t>(rows.path[rows.path_start[r + 1] - 1]);
            const float* from = head_of(r, h);
            for (size_t i = 0; i < static_cast<size_t>(size); i++) put(c % 2 ? at.value(row, i) : at.key(row, i), from[i]);
        }
    }
    wait(team);
}

// ------------------------------------------------------------------------------------------------------ attention

#if defined(__AVX512F__)
constexpr int QUERIES = 6, VECTORS = 4;  // of a tile's sums
#elif defined(__AVX2__)
constexpr int QUERIES = 6, VECTORS = 1;
#else
constexpr int QUERIES = 2, VECTORS = 2;
#endif
constexpr size_t ROWS_AHEAD = 16;       // values that are fetched early
constexpr int TOGETHER = MOST_QUERIES;  // queries that read the keys and values of a head together
#if defined(S4C_AMX)
constexpr int TAKEN = 32;  // numbers in half precision that a tile register takes in of each row at a time
#endif

// One head of one row: what it asks, where its answer goes, and which cache rows it sees.
struct Query {
    const float* head;
    float* out;
    int prefix, length;
    const int32_t* path;
};

// Scores of Q queries against KEYS blocks of sixteen cache rows.
template <int Q, int KEYS>
ALONE void score_blocks(const Query* queries, const FloatRows& at, int block, int size, float scale, float* scores, size_t stride) {
    const float* keys = at.key(static_cast<size_t>(block) * LANES, 0);
    vf sums[Q * KEYS];
    UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = zero();
    for (int i = 0; i < size; i++) {
        auto cells = [&](int b) { return keys + (static_cast<size_t>(b) * at.size + static_cast<size_t>(i)) * LANES; };
        for (int b = 0; b < KEYS; b++) __builtin_prefetch(cells(b) + static_cast<size_t>(KEYS * size) * LANES, 0, 3);
        UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = fma(load(cells(j % KEYS)), set1(queries[j / KEYS].head[i]), sums[j]);
    }
    UNROLLED for (int j = 0; j < Q * KEYS; j++)
        store(scores + stride * static_cast<size_t>(j / KEYS) + j % KEYS * LANES, mul(sums[j], set1(scale)));
}

template <int Q, int KEYS>
ALONE void score_blocks(const Query* queries, const HalfRows& at, int block, int size, float scale, float* scores, size_t stride) {
    const uint16_t* keys = at.key(static_cast<size_t>(block) * LANES, 0);
    vf sums[Q * KEYS];
    UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = zero();
    for (int i = 0; i < size; i += 2) {
        auto cells = [&](int b) { return keys + (static_cast<size_t>(b) * at.deep + static_cast<size_t>(i)) * LANES; };
        for (int b = 0; b < KEYS; b++) __builtin_prefetch(cells(b) + static_cast<size_t>(KEYS * size) * LANES, 0, 3);
        UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = fma(even_halves(cells(j % KEYS)), set1(queries[j / KEYS].head[i]), sums[j]);
        UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = fma(odd_halves(cells(j % KEYS)), set1(queries[j / KEYS].head[i + 1]), sums[j]);
    }
    UNROLLED for (int j = 0; j < Q * KEYS; j++)
        store(scores + stride * static_cast<size_t>(j / KEYS) + j % KEYS * LANES, mul(sums[j], set1(scale)));
}

// Softmax over logical positions, in lanes of position % 16; gives one over the sum. The highest scores before position
// `known` are in `most`; `put(i, p)` takes the weights of sixteen positions, zeros behind the last.
template <class E, class F>
inline float soften(float* scores, int count, vf most, int known, E power, F put) {
    for (int i = count; i < padded(count); i++) scores[i] = scores[count - 1];
    for (int i = known; i < count; i += LANES) most = maximum(most, load(scores + i));
    vf top = set1(max_lanes(most));
    vf sums = zero();
    for (int i = 0; i < count; i += LANES) {
        vf p = power(sub(load(scores + i), top));
        if (i + LANES > count) {
            store(scores + i, p);
            for (int j = count; j < i + LANES; j++) scores[j] = 0.0f;
            p = load(scores + i);
        }
        put(i, p);
        sums = add(sums, p);
    }
    return 1.0f / sum_lanes(sums);
}

inline vf value_lanes(const FloatRows& at, size_t row, size_t vector) { return load(at.value(row, vector * LANES)); }
inline vf value_lanes(const HalfRows& at, size_t row, size_t vector) {
    const uint16_t* pairs = at.value(row / 2 * 2, vector * LANES);
    return row % 2 ? odd_halves(pairs) : even_halves(pairs);
}

// Adds the weighted values of cache rows [begin, end), or of rows[begin ... end), to the sums of Q queries,
// [Q][head_dim padded]: V vectors of them. The weight of a row stands at its logical position, `shift` from its index.
template <int Q, int V, class Place>
ALONE void mix_values(const float* weights, size_t stride, const Place& at, size_t vector, size_t width, int begin, int end,
                      const int32_t* rows, int shift, float* out) {
    auto sum = [&](int j) { return out + width * static_cast<size_t>(j / V) + (vector + static_cast<size_t>(j % V)) * LANES; };
    vf sums[Q * V];
    UNROLLED for (int j = 0; j < Q * V; j++) sums[j] = load(sum(j));
    for (int i = begin; i < end; i++) {
        size_t row = static_cast<size_t>(rows ? rows[i] : i);
        vf value[V];
        UNROLLED for (int v = 0; v < V; v++) {
            value[v] = value_lanes(at, row, vector + static_cast<size_t>(v));
            __builtin_prefetch(at.value(row + ROWS_AHEAD, (vector + static_cast<size_t>(v)) * LANES), 0, 3);
        }
        auto weight = [&](int q) { return weights[stride * static_cast<size_t>(q) + static_cast<size_t>(shift + i)]; };
        UNROLLED for (int j = 0; j < Q * V; j++) sums[j] = fma(set1(weight(j / V)), value[j % V], sums[j]);
    }
    UNROLLED for (int j = 0; j < Q * V; j++) store(sum(j), sums[j]);
}

template <int Q, class Place>
void mix(const float* weights, size_t stride, const Place& at, size_t width, int begin, int end, const int32_t* rows, int shift,
         float* out) {
    size_t vectors = width / LANES, v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS) mix_values<Q, VECTORS>(weights, stride, at, v, width, begin, end, rows, shift, out);
    for (; v < vectors; v++) mix_values<Q, 1>(weights, stride, at, v, width, begin, end, rows, shift, out);
}

// Calls f(number, first query) for tiles that share the queries evenly, with a number that is known to the compiler.
template <int MOST = QUERIES, class F>
inline void with_number(int number, int q, F f) {
    if constexpr (MOST > 1) {
        if (number < MOST) return with_number<MOST - 1>(number, q, f);
    }
    f(std::integral_constant<int, MOST>(), q);
}

template <class F>
inline void each_tile(int count, F f) {
    int tiles = (count + QUERIES - 1) / QUERIES;
    for (int t = 0; t < tiles; t++) with_number(count * (t + 1) / tiles - count * t / tiles, count * t / tiles, f);
}

// The queries of one slot and key head, and the memory of the thread that works on them.
struct Asked {
    const Query* queries;
    int count, size, blocks, shared;  // blocks: of sixteen cache rows, as far as any query sees; shared: the prefix of all
    float scale;
    float* scores;  // [count, stride]
    size_t stride, width;
    float* sums;  // [count, width]
    vf* most;     // [count], the highest scores so far, lane by lane: where halves meet halves, of the whole blocks that all see
};

// Calls f(number of queries, first query, number of blocks, first block) for tiles of all queries and all blocks of keys.
template <class F>
inline void each_key_tile(const Asked& asked, F f) {
    auto some = [&](auto blocks, int b) { each_tile(asked.count, [&](auto number, int q) { f(number, q, blocks, b); }); };
    int b = 0;
    for (; b + VECTORS <= asked.blocks; b += VECTORS) some(std::integral_constant<int, VECTORS>(), b);
    for (; b < asked.blocks; b++) some(std::integral_constant<int, 1>(), b);
}

// Scores of all queries against all blocks of keys.
template <class Place>
void score(const Asked& asked, const Place& at) {
    each_key_tile(asked, [&](auto number, int q, auto blocks, int b) {
        score_blocks<decltype(number)::value, decltype(blocks)::value>(asked.queries + q, at, b, asked.size, asked.scale,
                                                                       asked.scores + asked.stride * static_cast<size_t>(q) + b * LANES, asked.stride);
    });
}

// Sums of values: the prefix that all share, the rest of each prefix, each path.
template <class Place>
void gather(const Asked& asked, const Place& at) {
    std::memset(asked.sums, 0, sizeof(float) * asked.width * static_cast<size_t>(asked.count));
    each_tile(asked.count, [&](auto number, int q) {
        size_t first = static_cast<size_t>(q);
        mix<decltype(number)::value>(asked.scores + asked.stride * first, asked.stride, at, asked.width, 0, asked.shared, nullptr, 0,
                                     asked.sums + asked.width * first);
    });
    for (int q = 0; q < asked.count; q++) {
        const Query& query = asked.queries[q];
        const float* line = asked.scores + asked.stride * static_cast<size_t>(q);
        float* sum = asked.sums + asked.width * static_cast<size_t>(q);
        mix<1>(line, asked.stride, at, asked.width, asked.shared, query.prefix, nullptr, 0, sum);
        mix<1>(line, asked.stride, at, asked.width, 0, query.length, query.path, query.prefix, sum);
    }
}

#if defined(__AVX512BF16__)

// Up to sixteen queries rounded to halves, then their weights, behind their sums.
inline uint16_t* halves(const Asked& asked) { return reinterpret_cast<uint16_t*>(asked.scores + MOST_QUERIES * (asked.stride + round_up(asked.width, 32))); }

inline void round_queries(const Asked& asked, const HalfRows& at) {
    for (int q = 0; q < asked.count; q++)
        to_bf16_row(asked.queries[q].head, asked.size, static_cast<int>(at.deep), halves(asked) + at.deep * static_cast<size_t>(q));
}

inline uint16_t* weights_of(const Asked& asked, const HalfRows& at, int q) { return halves(asked) + 16 * at.deep + asked.stride * static_cast<size_t>(q); }

inline size_t row_at(const Query& query, int t) { return static_cast<size_t>(t < query.prefix ? t : query.path[t - query.prefix]); }

#endif

#if defined(S4C_AMX)

// f(row of sums, first block, number of blocks), for all blocks of 16 outputs, a group of them at a time.
template <class F>
inline void tile_blocks(const uint16_t* w, size_t block, int blocks, int steps, const uint16_t* x, size_t stride, F f) {
    alignas(64) float sums[16 * GROUP * BLOCK];
    for (int b = 0; b < blocks; b += GROUP) {
        const char* weights = reinterpret_cast<const char*>(w + block * static_cast<size_t>(b));
        const char* rows = reinterpret_cast<const char*>(x);
        size_t bytes = 2 * block;
        int now = blocks - b < GROUP ? blocks - b : GROUP;
        if (now == 4) tile_registers<BFLOAT16, 4>(weights, bytes, steps, rows, 2 * stride, sums);
        else if (now == 3) tile_registers<BFLOAT16, 3>(weights, bytes, steps, rows, 2 * stride, sums);
        else if (now == 2) tile_registers<BFLOAT16, 2>(weights, bytes, steps, rows, 2 * stride, sums);
        else tile_registers<BFLOAT16, 1>(weights, bytes, steps, rows, 2 * stride, sums);
        f(sums, b, now);
    }
}

void score(const Asked& asked, const HalfRows& at) {
    round_queries(asked, at);
    tile_blocks(at.keys, at.deep * BLOCK, asked.blocks, static_cast<int>(at.deep / TAKEN), halves(asked), at.deep, [&](const float* sums, int first, int now) {
        int seen = asked.shared / BLOCK - first;
        for (int q = 0; q < asked.count; q++) {
            vf most = asked.most[q];
            for (int b = 0; b < now; b++) {
                vf scores = mul(load(sums + (q * GROUP + b) * BLOCK), set1(asked.scale));
                store(asked.scores + asked.stride * static_cast<size_t>(q) + (first + b) * BLOCK, scores);
                if (b < seen) most = maximum(most, scores);
            }
            asked.most[q] = most;
        }
    });
}

// The values of the logical positions [begin, end) of one query, by the arithmetic of a tile register: of the positions
// that it takes in at a time the even ones are added up, the odd ones, and both.
template <int V>
inline void gather_rest(const Query& query, const uint16_t* weights, const HalfRows& at, size_t vector, int begin, int end, float* out) {
    for (int chunk = begin; chunk < end; chunk += TAKEN) {
        vf sums[2][V];
        for (int v = 0; v < V; v++) sums[0][v] = sums[1][v] = zero();
        for (int t = chunk; t < end && t < chunk + TAKEN; t++) {
            vf weight = set1(bf16_value(weights[t]));
            for (int v = 0; v < V; v++) sums[t % 2][v] = fma(weight, value_lanes(at, row_at(query, t), vector + static_cast<size_t>(v)), sums[t % 2][v]);
        }
        for (int v = 0; v < V; v++) {
            float* sum = out + (vector + static_cast<size_t>(v)) * LANES;
            store(sum, add(load(sum), add(sums[0][v], sums[1][v])));
        }
    }
}

void gather(const Asked& asked, const HalfRows& at) {
    int whole = asked.shared / TAKEN, vectors = static_cast<int>(asked.width) / LANES;
    tile_blocks(at.values, at.rows * BLOCK, vectors, whole, weights_of(asked, at, 0), asked.stride, [&](const float* sums, int first, int now) {
        for (int q = 0; q < asked.count; q++)
            std::memcpy(asked.sums + asked.width * static_cast<size_t>(q) + first * BLOCK, sums + q * GROUP * BLOCK, sizeof(float) * static_cast<size_t>(now * BLOCK));
    });
    for (int q = 0; q < asked.count; q++) {
        const Query& query = asked.queries[q];
        const uint16_t* weights = weights_of(asked, at, q);
        float* sum = asked.sums + asked.width * static_cast<size_t>(q);
        int begin = whole * TAKEN, end = query.prefix + query.length, v = 0;
        for (; v + VECTORS <= vectors; v += VECTORS) gather_rest<VECTORS>(query, weights, at, static_cast<size_t>(v), begin, end, sum);
        for (; v < vectors; v++) gather_rest<1>(query, weights, at, static_cast<size_t>(v), begin, end, sum);
    }
}

#elif defined(__AVX512BF16__)

template <int Q, int KEYS>
ALONE void score_pairs(const uint16_t* queries, const HalfRows& at, int block, int seen, float scale, float* scores, size_t stride, vf* most) {
    const uint16_t* keys = at.key(static_cast<size_t>(block) * LANES, 0);
    vf sums[Q * KEYS];
    UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = zero();
    for (size_t i = 0; i < at.deep; i += 2) {
        auto cells = [&](int b) { return keys + (static_cast<size_t>(b) * at.deep + i) * LANES; };
        auto pair = [&](int q) { return queries + at.deep * static_cast<size_t>(q) + i; };
        for (int b = 0; b < KEYS; b++) __builtin_prefetch(cells(b + KEYS), 0, 3);
        UNROLLED for (int j = 0; j < Q * KEYS; j++) sums[j] = add_pair_products(_mm512_loadu_si512(cells(j % KEYS)), pair(j / KEYS), sums[j]);
    }
    UNROLLED for (int j = 0; j < Q * KEYS; j++) {
        vf scaled = mul(sums[j], set1(scale));
        store(scores + stride * static_cast<size_t>(j / KEYS) + j % KEYS * LANES, scaled);
        if (block + j % KEYS < seen) most[j / KEYS] = maximum(most[j / KEYS], scaled);
    }
}

void score(const Asked& asked, const HalfRows& at) {
    round_queries(asked, at);
    each_key_tile(asked, [&](auto number, int q, auto blocks, int b) {
        score_pairs<decltype(number)::value, decltype(blocks)::value>(halves(asked) + at.deep * static_cast<size_t>(q), at, b, asked.shared / LANES, asked.scale,
                                                                      asked.scores + asked.stride * static_cast<size_t>(q) + b * LANES, asked.stride, asked.most + q);
    });
}

// Weighted values of `pairs` pairs of the prefix: V vectors of them for Q queries.
template <int Q, int V>
ALONE void mix_pairs(const uint16_t* weights, size_t stride, const HalfRows& at, size_t vector, size_t width, int pairs, float* out) {
    vf sums[Q * V];
    UNROLLED for (int j = 0; j < Q * V; j++) sums[j] = zero();
    for (int i = 0; i < pairs; i++) {
        size_t row = 2 * static_cast<size_t>(i);
        __m512i values[V];
        UNROLLED for (int v = 0; v < V; v++) {
            values[v] = _mm512_loadu_si512(at.value(row, (vector + static_cast<size_t>(v)) * LANES));
            __builtin_prefetch(at.value(row + ROWS_AHEAD, (vector + static_cast<size_t>(v)) * LANES), 0, 3);
        }
        UNROLLED for (int j = 0; j < Q * V; j++) sums[j] = add_pair_products(values[j % V], weights + stride * static_cast<size_t>(j / V) + row, sums[j]);
    }
    UNROLLED for (int j = 0; j < Q * V; j++) store(out + width * static_cast<size_t>(j / V) + (vector + static_cast<size_t>(j % V)) * LANES, sums[j]);
}

// The values of two rows of the cache side by side.
inline __m512i pair_of(const HalfRows& at, size_t even, size_t odd, size_t lane) {
    const uint16_t *a = at.value(even / 2 * 2, lane), *b = at.value(odd / 2 * 2, lane);
    __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    if (even % 2) first = _mm512_srli_epi32(first, 16);
    if (odd % 2 == 0) second = _mm512_slli_epi32(second, 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, first, second);
}

// Pairs of logical positions meet a pair of values in one way, wherever in the cache these lie; the last one may be alone.
void gather(const Asked& asked, const HalfRows& at) {
    int whole = asked.shared / 2;
    size_t vectors = asked.width / LANES;
    each_tile(asked.count, [&](auto number, int q) {
        constexpr int Q = decltype(number)::value;
        const uint16_t* weights = weights_of(asked, at, q);
        float* sums = asked.sums + asked.width * static_cast<size_t>(q);
        size_t v = 0;
        for (; v + VECTORS <= vectors; v += VECTORS) mix_pairs<Q, VECTORS>(weights, asked.stride, at, v, asked.width, whole, sums);
        for (; v < vectors; v++) mix_pairs<Q, 1>(weights, asked.stride, at, v, asked.width, whole, sums);
    });
    for (int q = 0; q < asked.count; q++) {
        const Query& query = asked.queries[q];
        const uint16_t* weights = weights_of(asked, at, q);
        for (int t = 2 * whole, end = query.prefix + query.length; t < end; t += 2) {
            size_t even = row_at(query, t), odd = t + 1 < end ? row_at(query, t + 1) : even;
            for (size_t v = 0; v < vectors; v++) {
                float* sum = asked.sums + asked.width * static_cast<size_t>(q) + v * LANES;
                store(sum, add_pair_products(pair_of(at, even, odd, v * LANES), weights + t, load(sum)));
            }
        }
    }
}

#endif

// Softmax of the scores of one query.
template <class Place>
inline float weigh(const Asked& asked, const Place&, int q) {
    float* line = asked.scores + asked.stride * static_cast<size_t>(q);
    int end = asked.queries[q].prefix + asked.queries[q].length;
    return soften(line, end, asked.most[q], 0, [](vf x) { return exponential(x); }, [&](int i, vf p) { store(line + i, p); });
}

#if defined(__AVX512BF16__)
// The same rounded to halves, zeros behind the last.
inline float weigh(const Asked& asked, const HalfRows& at, int q) {
    uint16_t* half = weights_of(asked, at, q);
    float* line = asked.scores + asked.stride * static_cast<size_t>(q);
    int end = asked.queries[q].prefix + asked.queries[q].length;
    return soften(line, end, asked.most[q], asked.shared / LANES * LANES, [](vf x) { return rough_exponential(x); },
                  [&](int i, vf p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), (__m256i)_mm512_cvtneps_pbh(p)); });
}
#endif

// Attention of queries that share a slot and a key head. Each query adds up its own logical positions in order.
template <class Place>
void attend(const Place& at, const Query* queries, int count, int size, float* scores, size_t stride) {
    vf most[TOGETHER];
    for (int q = 0; q < count; q++) most[q] = set1(-INFINITY);
    Asked asked{queries, count, size, 0, queries[0].prefix, 1.0f / std::sqrt(static_cast<float>(size)), scores, stride,
                static_cast<size_t>(padded(size)), scores + stride * TOGETHER, most};
    for (int q = 0; q < count; q++) {
        int last = queries[q].path[queries[q].length - 1] / LANES + 1;
        asked.blocks = last > asked.blocks ? last : asked.blocks;
        asked.shared = queries[q].prefix < asked.shared ? queries[q].prefix : asked.shared;
    }
    score(asked, at);
    float inverse[TOGETHER];
    for (int q = 0; q < count; q++) {
        float* line = scores + stride * static_cast<size_t>(q);
        const Query& query = queries[q];
        for (int i = 0; i < query.length; i++) line[query.prefix + i] = line[query.path[i]];  // path[i] >= prefix + i, and ascends
        inverse[q] = weigh(asked, at, q);
    }
    gather(asked, at);
    for (int q = 0; q < count; q++)
        for (int i = 0; i < size; i++) queries[q].out[i] = asked.sums[asked.width * static_cast<size_t>(q) + static_cast<size_t>(i)] * inverse[q];
}

// Attention of all rows; a unit of work is a few heads of a few rows of a slot that share a key head.
template <class Place>
void attention(const Stack& stack, int layer, const Cache& cache, const Rows& rows, Scratch& s, const Team& team) {
    int group = stack.heads / stack.kv_heads;
    int parts = (group + TOGETHER - 1) / TOGETHER;
    if (rows.count * stack.kv_heads * parts < team.threads) parts = group;  // one head each, so that all have work
    int height = TOGETHER / ((group + parts - 1) / parts);
    if (rows.count < 2 * height) height = (rows.count + 1) / 2;
    int tiles = (rows.count + height - 1) / height;
    Span units = share(tiles * stack.kv_heads * parts, team);
    float* scores = s.scores + s.score_stride * static_cast<size_t>(team.thread);
    for (int unit = units.begin; unit < units.end; unit++) {
        int tile = unit % tiles, part = unit / tiles % parts, head = unit / tiles / parts;
        int first = group * part / parts, last = group * (part + 1) / parts;
        int end = rows.count * (tile + 1) / tiles;
        Query queries[TOGETHER];
        for (int r = rows.count * tile / tiles, count = 0; r < end; r++) {
            for (int h = first; h < last; h++) {
                size_t offset = s.wide_stride * static_cast<size_t>(r) + static_cast<size_t>((head * group + h) * stack.head_dim);
                int start = rows.path_start[r];
                queries[count++] = {s.wide + offset, s.context + offset, rows.prefix[r], rows.path_start[r + 1] - start, rows.path + start};
            }
            if (r + 1 == end || rows.slot[r + 1] != rows.slot[r]) {
                Place at(cache, place_of(cache, stack.kv_heads, layer, rows.slot[r], head), stack.head_dim);
                attend(at, queries, count, stack.head_dim, scores, s.row_scores);
                count = 0;
            }
        }
    }
    wait(team);
}

// ------------------------------------------------------------------------------------------------------- the pass

void turn_angles(const Stack& stack, const Rows& rows, Scratch& s, const Team& team) {
    int half = stack.head_dim / 2;
    Span mine = share(rows.count, team);
    for (int r = mine.begin; r < mine.end; r++) {
        int position = rows.prefix[r] + rows.path_start[r + 1] - rows.path_start[r] - 1;
        float* angles = s.angles + static_cast<size_t>(stack.head_dim) * static_cast<size_t>(r);
        for (int i = 0; i < half; i++) {
            float angle = static_cast<float>(position) * stack.frequencies[i];
            angles[i] = cosf(angle) * stack.rope_scale;
            angles[half + i] = sinf(angle) * stack.rope_scale;
        }
    }
}

struct Tiles {
#if defined(S4C_AMX)
    Tiles() {
        TileConfig config;
        _tile_loadconfig(&config);
        _mm_setcsr(before_ | 0x8040);  // numbers below the normal ones are zero everywhere, as tile registers have it
    }
    ~Tiles() {
        _tile_release();
        _mm_setcsr(before_);
    }

   private:
    unsigned before_ = _mm_getcsr();
#else
    Tiles() {}
    ~Tiles() {}
#endif
};

// Rows [count] of the residual stream into part `part` of what a pass gives, normed where there is a weight.
void give(const Stack& stack, const Rows& rows, const Scratch& s, int part, const float* norm, float* out, const Team& team) {
    size_t hidden = static_cast<size_t>(stack.hidden), wide = hidden * static_cast<size_t>(1 + s.tap_count);
    Span mine = share(rows.count, team);
    for (int r = mine.begin; r < mine.end; r++) {
        const float* x = s.x + hidden * static_cast<size_t>(r);
        float* y = out + wide * static_cast<size_t>(r) + hidden * static_cast<size_t>(part);
        if (norm) norm_row(x, norm, stack.hidden, stack.eps, y);
        else std::memcpy(y, x, sizeof(float) * hidden);
    }
}

template <class Place>
void layers(const Stack& stack, const Cache& cache, const Rows& rows, Scratch& s, float* out, const Team& team) {
    int n = rows.count, tap = 0;
    size_t hidden = static_cast<size_t>(stack.hidden);
    for (int index = 0; index < stack.layers; index++) {
        const Layer& layer = stack.layer[index];
        norm_rows(layer.qkv, s.x, layer.attention_norm, stack.hidden, stack.eps, n, s, team);
        product(layer.qkv, n, s, Into::SET, s.wide, s.wide_stride, team);
        place_heads<Place>(stack, layer, index, cache, rows, s, team);
        attention<Place>(stack, index, cache, rows, s, team);
        prepare(layer.out, s.context, s.wide_stride, n, s, team);
        product(layer.out, n, s, Into::ADD, s.x, hidden, team);
        norm_rows(layer.gate_up, s.x, layer.mlp_norm, stack.hidden, stack.eps, n, s, team);
        product(layer.gate_up, n, s, Into::SWIGLU, s.wide, s.wide_stride, team);
        prepare(layer.down, s.wide, s.wide_stride, n, s, team);
        product(layer.down, n, s, Into::ADD, s.x, hidden, team);
        if (tap < s.tap_count && s.taps[tap] == index + 1) give(stack, rows, s, ++tap, nullptr, out, team);
    }
}

// The layers' input: the rows as they are, or the join of their halves.
void enter(const Stack& stack, const float* x, int count, Scratch& s, const Team& team) {
    size_t hidden = static_cast<size_t>(stack.hidden);
    Span mine = share(count, team);
    for (int r = mine.begin; r < mine.end; r++) {
        if (!stack.join_norm) {
            std::memcpy(s.x + hidden * static_cast<size_t>(r), x + hidden * static_cast<size_t>(r), sizeof(float) * hidden);
            continue;
        }
        const float* pair = x + 2 * hidden * static_cast<size_t>(r);
        float* normed = s.context + s.wide_stride * static_cast<size_t>(r);
        norm_row(pair, stack.join_norm, stack.hidden, stack.eps, normed);
        std::memcpy(normed + hidden, pair + hidden, sizeof(float) * hidden);
        prepare_row(stack.join, normed, r, s);
    }
    if (stack.join_norm) {
        wait(team);
        product(stack.join, count, s, Into::SET, s.x, hidden, team);
    }
}

void pass(const Stack& stack, const Cache& cache, const Rows& rows, const float* x, Scratch& s, float* out, Team team) {
    Tiles tiles;
    enter(stack, x, rows.count, s, team);
    turn_angles(stack, rows, s, team);
    if (cache.half) layers<HalfRows>(stack, cache, rows, s, out, team);
    else layers<FloatRows>(stack, cache, rows, s, out, team);
    give(stack, rows, s, 0, stack.final_norm, out, team);
}

void linear(const Linear& layer, const float* x, size_t stride, int count, Scratch& s, float* out, Team team) {
    Tiles tiles;
    prepare(layer, x, stride, count, s, team);
    product(layer, count, s, Into::OUT, out, static_cast<size_t>(layer.outputs), team);
}

// The k highest numbers of a row in descending order, of equals the first, and the log of the sum of all exponentials.
// The k highest maxima of chunks bound the k highest numbers from below, so few chunks are looked into.
void top_row(const float* x, int columns, int k, float* values, int64_t* indices, float* total) {
    constexpr int CHUNK = 8 * LANES;
    float bounds[MOST_TOP];
    for (int i = 0; i < k; i++) bounds[i] = values[i] = -INFINITY, indices[i] = 0;
    auto highest = [&](int begin) {
        int end = begin + CHUNK < columns ? begin + CHUNK : columns, i = begin + LANES;
        if (end - begin < LANES) {
            float most = x[begin];
            for (i = begin + 1; i < end; i++) most = x[i] > most ? x[i] : most;
            return most;
        }
        vf most = load(x + begin);
        for (; i + LANES <= end; i += LANES) most = maximum(most, load(x + i));
        return max_lanes(maximum(most, load(x + end - LANES)));
    };
    for (int begin = 0; begin < columns; begin += CHUNK) {
        float most = highest(begin);
        if (!(most > bounds[k - 1])) continue;
        int at = k - 1;
        for (; at > 0 && bounds[at - 1] < most; at--) bounds[at] = bounds[at - 1];
        bounds[at] = most;
    }
    vf top = set1(bounds[0]), sums = zero();
    float rest = 0;
    int found = 0;
    for (int begin = 0; begin < columns; begin += CHUNK) {
        int end = begin + CHUNK < columns ? begin + CHUNK : columns, i = begin;
        for (; i + LANES <= end; i += LANES) sums = add(sums, exponential(sub(load(x + i), top)));
        for (; i < end; i++) rest += expf(x[i] - bounds[0]);
        if (highest(begin) < bounds[k - 1]) continue;
        for (i = begin; i < end; i++) {
            if (x[i] < bounds[k - 1] || (found == k && !(x[i] > values[k - 1]))) continue;
            int at = found < k ? found++ : k - 1;
            for (; at > 0 && values[at - 1] < x[i]; at--) values[at] = values[at - 1], indices[at] = indices[at - 1];
            values[at] = x[i], indices[at] = i;
        }
    }
    *total = bounds[0] == -INFINITY ? -INFINITY : bounds[0] + logf(sum_lanes(sums) + rest);
}

void top(const float* x, int count, int columns, int k, float* values, int64_t* indices, float* totals, Team team) {
    Span rows = share(count, team);
    for (int r = rows.begin; r < rows.end; r++) {
        size_t at = static_cast<size_t>(r) * static_cast<size_t>(k);
        top_row(x + static_cast<size_t>(r) * static_cast<size_t>(columns), columns, k, values + at, indices + at, totals + r);
    }
}

// Where a row is highest, cooled and with noise, of equals the first; or what stands for a token where there is no law.
int64_t choose(const float* x, int columns, float temperature, const float* noise) {
    constexpr int CHUNK = 16 * LANES;
    float divisor = temperature == 0.0f ? 1.0f : temperature, best = -INFINITY;
    auto at = [&](int i) { return noise ? x[i] / divisor + noise[i] : x[i] / divisor; };
    auto some = [&](int i) {
        vf cooled = div(load(x + i), set1(divisor));
        return noise ? add(cooled, load(noise + i)) : cooled;
    };
    int chunk = 0;
    vf nothing = zero();
    for (int begin = 0; begin < columns; begin += CHUNK) {
        int end = begin + CHUNK < columns ? begin + CHUNK : columns, i = begin;
        vf most = set1(-INFINITY);
        for (; i + LANES <= end; i += LANES) {
            vf values = some(i);
            most = maximum(most, values);
            nothing = fma(values, zero(), nothing);
        }
        float top = max_lanes(most);
        for (; i < end; i++) top = at(i) > top ? at(i) : top, nothing = fma(set1(at(i)), zero(), nothing);
        if (top > best) best = top, chunk = begin;
    }
    if (std::isnan(sum_lanes(nothing)))  // of NaN or infinity
        for (int i = 0; i < columns; i++)
            if (std::isnan(at(i))) return NO_NUMBERS;
    if (std::isinf(best)) return best < 0 ? NOTHING : NO_NUMBERS;
    while (at(chunk) != best) chunk++;
    return chunk;
}

void judge(const Trees& trees, const float* logits, int columns, int64_t* paths, int64_t* tokens, int64_t* accepted, Team team) {
    Span rows = share(trees.batch, team);
    for (int b = rows.begin; b < rows.end; b++) {
        size_t first = static_cast<size_t>(b) * static_cast<size_t>(trees.nodes);
        const int64_t *drafted = trees.tokens + first, *parents = trees.parents + first;
        const uint8_t* candidate = trees.candidate + first;
        int64_t *path = paths + first, *chosen = tokens + first;
        int node = 0, depth = 0;
        for (;; depth++) {
            const float* row = logits + (first + static_cast<size_t>(node)) * static_cast<size_t>(columns);
            const float* noise = trees.noise ? trees.noise[b * trees.levels + depth] : nullptr;
            path[depth] = node, chosen[depth] = choose(row, columns, trees.temperatures[b], noise);
            int child = node + 1;
            while (child < trees.nodes && !(candidate[child] && parents[child] == node && drafted[child] == chosen[depth])) child++;
            if (child == trees.nodes) break;
            node = child;
        }
        accepted[b] = depth;
        for (int i = depth + 1; i < trees.nodes; i++) path[i] = path[depth], chosen[i] = chosen[depth];
    }
}

void noise(uint64_t seed, uint32_t stream, uint64_t position, int size, float* out, Team team) {
    Span blocks = share((size + WORDS - 1) / WORDS, team);
    for (int block = blocks.begin; block < blocks.end; block++) {
        int left = size - block * WORDS;
        noise_block(static_cast<uint32_t>(block), position, stream, seed, left < WORDS ? left : WORDS, out + block * WORDS);
    }
}

constexpr Kernels KERNELS = {pass, linear, top, judge, noise};

}  // namespace

const Kernels* JOIN(kernels_, S4C_VARIANT)() { return &KERNELS; }
