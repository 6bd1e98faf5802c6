// Sixteen floats or integers at a time, for each instruction set. A product with a sum is fused or not by what is written
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

inline float bf16_value(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

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
inline vf even_halves(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline vf odd_halves(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

#if defined(__AVX512BF16__)
// Of each lane a pair of halves, times one pair, which is added up.
inline vf add_pair_products(__m512i pairs, const uint16_t* pair, vf sums) {
    int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(both));
}
#endif

// Pairs of lanes that are STRIDE apart become their sum and their difference.
template <int STRIDE>
inline vf butterfly(vf x) {
    vf other = STRIDE == 8   ? _mm512_shuffle_f32x4(x, x, 0x4e)
               : STRIDE == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
               : STRIDE == 2 ? _mm512_permute_ps(x, 0x4e)
                             : _mm512_permute_ps(x, 0xb1);
    constexpr __mmask16 second = STRIDE == 8 ? 0xff00 : STRIDE == 4 ? 0xf0f0 : STRIDE == 2 ? 0xcccc : 0xaaaa;
    return _mm512_mask_sub_ps(_mm512_add_ps(x, other), second, other, x);
}

using vi = __m512i;

inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
// Whole numbers from -127 to 127; NaN becomes any number.
inline void store_bytes(int8_t* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
#if defined(__AVX512VNNI__)
// The inputs go in as x + 128, for the instruction multiplies unsigned by signed bytes.
inline vi first_sums(const int32_t* weight_sums) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(load(weight_sums), 7)); }
inline vi add_products(vi weights, int32_t four, vi sums) {
    return _mm512_dpbusd_epi32(sums, _mm512_xor_si512(_mm512_set1_epi32(four), _mm512_set1_epi8(-128)), weights);
}
#else
// |w| times x with the sign of w: pairs of products stay within 16 bits, for no weight is -128.
inline vi first_sums(const int32_t*) { return _mm512_setzero_si512(); }
inline vi add_products(vi weights, int32_t four, vi sums) {
    __m512i x = _mm512_set1_epi32(four);
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), x);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), x);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

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
inline __m256i load_8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline vf even_halves(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(load_8(p), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(load_8(p + 16), 16))};
}
inline vf odd_halves(const uint16_t* p) {
    __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(load_8(p), mask)), _mm256_castsi256_ps(_mm256_and_si256(load_8(p + 16), mask))};
}

template <int STRIDE>
inline __m256 butterfly(__m256 x) {
    __m256 other = STRIDE == 4 ? _mm256_permute2f128_ps(x, x, 0x01) : STRIDE == 2 ? _mm256_permute_ps(x, 0x4e) : _mm256_permute_ps(x, 0xb1);
    constexpr int second = STRIDE == 4 ? 0xf0 : STRIDE == 2 ? 0xcc : 0xaa;
    return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), second);
}
// Pairs of lanes that are STRIDE apart become their sum and their difference.
template <int STRIDE>
inline vf butterfly(vf x) {
    if constexpr (STRIDE == 8) return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
    else return {butterfly<STRIDE>(x.a), butterfly<STRIDE>(x.b)};
}

struct vi {
    __m256i a, b;
};

inline vi load(const int32_t* p) { return {load_8(p), load_8(p + 8)}; }
inline void store(int32_t* p, vi x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// Whole numbers from -127 to 127; NaN becomes any number.
inline void store_bytes(int8_t* p, vf x) {
    __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline vi first_sums(const int32_t*) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// |w| times x with the sign of w: pairs of products stay within 16 bits, for no weight is -128.
inline __m256i add_products(__m256i weights, __m256i x, __m256i sums) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline vi add_products(vi weights, int32_t four, vi sums) {
    __m256i x = _mm256_set1_epi32(four);
    return {add_products(weights.a, x, sums.a), add_products(weights.b, x, sums.b)};
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
inline vf even_halves(const uint16_t* p) { return each([=](int i) { return bf16_value(p[2 * i]); }); }
inline vf odd_halves(const uint16_t* p) { return each([=](int i) { return bf16_value(p[2 * i + 1]); }); }

// Pairs of lanes that are STRIDE apart become their sum and their difference.
template <int STRIDE>
inline vf butterfly(const vf& x) {
    return each([&](int i) { return i & STRIDE ? x.lane[i - STRIDE] - x.lane[i] : x.lane[i] + x.lane[i + STRIDE]; });
}

struct vi {
    int32_t lane[LANES];
};

inline vi load(const int32_t* p) {
    vi out;
    std::memcpy(out.lane, p, sizeof(out.lane));
    return out;
}
inline void store(int32_t* p, const vi& x) { std::memcpy(p, x.lane, sizeof(x.lane)); }
inline vf to_float(const vi& x) { return each([&](int i) { return static_cast<float>(x.lane[i]); }); }
// Whole numbers from -127 to 127; NaN becomes any number.
inline void store_bytes(int8_t* p, const vf& x) {
    for (int i = 0; i < LANES; i++) p[i] = std::isnan(x.lane[i]) ? int8_t{0} : static_cast<int8_t>(x.lane[i]);
}
inline vi first_sums(const int32_t*) { return {}; }
inline vi add_products(const vi& weights, int32_t four, vi sums) {
    int8_t w[4 * LANES], x[4];
    std::memcpy(w, weights.lane, sizeof(w));
    std::memcpy(x, &four, sizeof(x));
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sums.lane[i] += w[4 * i + j] * x[j];
    return sums;
}

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

// e^x to one part in 100,000, for x held within [-87, 0]: enough for what becomes a half. NaN stays NaN.
inline vf rough_exponential(vf x) {
    vf t = mul(maximum(set1(-87.0f), x), set1(1.44269504088896341f)), n = nearest(t), r = sub(t, n);
    vf p = fma(set1(9.57009041e-3f), r, set1(5.59178594e-2f));
    p = fma(p, r, set1(2.40247451e-1f));
    p = fma(p, r, set1(6.93121815e-1f));
    p = fma(p, r, set1(9.99999261e-1f));
    return times_power_of_two(p, n);
}

// Stores past the caches where whole lines are written: one that is not there need not be read first, which would take
// its turn among the weights that are read. Other threads see them after `drain`.
#if defined(__AVX512F__)
inline void stream(float* p, vf x) { reinterpret_cast<uintptr_t>(p) % 64 ? _mm512_storeu_ps(p, x) : _mm512_stream_ps(p, x); }
inline void drain() { _mm_sfence(); }
#else
inline void stream(float* p, vf x) { store(p, x); }
inline void drain() {}
#endif

// Round to the nearest bf16, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
