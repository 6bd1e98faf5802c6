// Sixteen floats at a time, for each instruction set. A product with a sum is fused or not by what is written
// here and nowhere else (-ffp-contract=off), so that a result never depends on what the compiler inlined.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

#if defined(__AVX512F__)

using vf = __m512;

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf minimum(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf absolute(vf a) { return _mm512_abs_ps(a); }
inline vf nearest(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf times_power_of_two(vf a, vf n) { return _mm512_scalef_ps(a, n); }
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    __m512i pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline vf load_i32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

#elif defined(__AVX2__) && defined(__FMA__)

struct vf {
    __m256 a, b;
};

inline vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf maximum(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf minimum(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf absolute(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline vf nearest(vf x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power_of_two(__m256 n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
inline vf times_power_of_two(vf x, vf n) {
    return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))};
}
inline vf load_i32(const int32_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
            _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8)))};
}

#else

struct vf {
    float lane[LANES];
};

template <class F>
inline vf each(F f) {
    vf out;
    for (int i = 0; i < LANES; i++) out.lane[i] = f(i);
    return out;
}
inline float bf16_value(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline vf zero() { return each([](int) { return 0.0f; }); }
inline vf set1(float x) { return each([=](int) { return x; }); }
inline vf load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, const vf& x) { std::memcpy(p, x.lane, sizeof(x.lane)); }
inline vf add(const vf& a, const vf& b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline vf sub(const vf& a, const vf& b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline vf mul(const vf& a, const vf& b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline vf div(const vf& a, const vf& b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline vf fma(const vf& a, const vf& b, const vf& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline vf maximum(const vf& a, const vf& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline vf minimum(const vf& a, const vf& b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline vf absolute(const vf& a) { return each([&](int i) { return std::fabs(a.lane[i]); }); }
inline vf nearest(const vf& a) { return each([&](int i) { return std::nearbyintf(a.lane[i]); }); }
inline vf times_power_of_two(const vf& a, const vf& n) {
    return each([&](int i) { return std::ldexp(a.lane[i], static_cast<int>(n.lane[i])); });
}
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    even = each([=](int i) { return bf16_value(p[2 * i]); });
    odd = each([=](int i) { return bf16_value(p[2 * i + 1]); });
}
inline vf load_i32(const int32_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }

#endif

// The sum of the lanes, always in the same tree: halves, quarters, pairs.
inline float sum_lanes(vf x) {
    float lane[LANES];
    store(lane, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

inline float max_lanes(vf x) {
    float lane[LANES];
    store(lane, x);
    float most = lane[0];
    for (int i = 1; i < LANES; i++) most = lane[i] > most ? lane[i] : most;
    return most;
}

// e^x to two units in the last place, for x held within [-87, 88]. NaN stays NaN.
inline vf exponential(vf x) {
    vf clamped = maximum(set1(-87.0f), minimum(set1(88.0f), x));  // the second argument wins where one is NaN
    vf n = nearest(mul(clamped, set1(1.44269504088896341f)));
    vf r = fma(n, set1(-0.693359375f), clamped);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return times_power_of_two(p, n);
}

// Round to the nearest bf16, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
