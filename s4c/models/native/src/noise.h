// Gumbel noise of the tokens of a position, bit by bit that of s4c/verify/noise.py. Plain loops over sixteen lanes, and no
// product that is fused with a sum: the compiler may use what vectors it has, and the numbers are the same on all machines.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int COUNTERS = 16, WORDS = 4 * COUNTERS;  // of a block: sixteen counters, each of which gives four words

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011): the words of one block of a row.
inline void philox(uint32_t block, uint64_t position, uint32_t stream, uint64_t seed, uint32_t* words) {
    uint32_t *a = words, *b = a + COUNTERS, *c = b + COUNTERS, *d = c + COUNTERS;
    for (int i = 0; i < COUNTERS; i++) {
        a[i] = block * COUNTERS + static_cast<uint32_t>(i);
        b[i] = static_cast<uint32_t>(position);
        c[i] = stream;
        d[i] = static_cast<uint32_t>(position >> 32);
    }
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u)
        for (int i = 0; i < COUNTERS; i++) {
            uint64_t first = uint64_t{0xD2511F53u} * a[i], second = uint64_t{0xCD9E8D57u} * c[i];
            a[i] = static_cast<uint32_t>(second >> 32) ^ b[i] ^ low;
            c[i] = static_cast<uint32_t>(first >> 32) ^ d[i] ^ high;
            b[i] = static_cast<uint32_t>(second);
            d[i] = static_cast<uint32_t>(first);
        }
}

// log(1 + r) + e log 2, for r within [-0.3, 0.42].
inline float logarithm(float r, float e) {
    float p = 7.0376836292e-2f;
    p = p * r + -1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r + -1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r + -1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r + -2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    float square = r * r;
    float rest = p * r * square + e * -2.12194440e-4f;
    return r + (rest - square * 0.5f) + e * 0.693359375f;
}

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_bits(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// By masks, for loops with branches are not made into vectors.
inline float choose(int32_t all_ones_or_zero, float one, float other) {
    return of_bits((bits_of(one) & all_ones_or_zero) | (bits_of(other) & ~all_ones_or_zero));
}

// x = 2^e (1 + r), with 1 + r from the root of 1/2 to that of 2; x is a normal number.
inline float split(float x, int32_t* e) {
    constexpr int32_t ROOT = 0x3f3504f3;  // of 1/2
    int32_t bits = bits_of(x), mantissa = (bits & 0x007fffff) | 0x3f000000, low = -(mantissa < ROOT);
    *e = (bits >> 23) - 126 + low;
    return of_bits(mantissa + (low & 0x00800000)) - 1.0f;
}

// -log of a standard exponential. The word says which half of (0, 1) and how far from its outer end, so that neither tail
// is coarse.
inline float gumbel(uint32_t word) {
    int32_t as_signed = static_cast<int32_t>(word), near_zero = as_signed >> 31, e;
    float tail = (static_cast<float>(as_signed ^ near_zero) + 0.5f) * 0x1p-32f;
    float r = split(choose(near_zero, tail, 1.0f - tail), &e);
    float exponential = -logarithm(choose(~near_zero & -(e == 0), -tail, r), static_cast<float>(e));
    r = split(exponential, &e);
    return -logarithm(r, static_cast<float>(e));
}

void noise_block(uint32_t block, uint64_t position, uint32_t stream, uint64_t seed, int count, float* out) {
    uint32_t words[WORDS];
    float values[WORDS];
    philox(block, position, stream, seed, words);
    for (int i = 0; i < WORDS; i++) values[i] = gumbel(words[i]);
    std::memcpy(out, values, sizeof(float) * static_cast<size_t>(count));
}

}  // namespace
