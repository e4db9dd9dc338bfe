// Vectors of floats for AVX-512, AVX2, NEON, and any other processor. Arithmetic is that of GCC's and Clang's vector
// types; only loads that widen have a form for each processor.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__F16C__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vector load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, vector v) { *(unaligned *)to = v; }
INLINE vector all(float value) { return value - (vector){0}; }

INLINE float sum(vector v) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#elif LANES == 8
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// The sums of four vectors, which cost little more together than one alone.
INLINE void sum_4(float *sums, vector a, vector b, vector c, vector d) {
#if LANES == 16
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
#endif
}

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Exact, also for subnormal numbers, infinities and NaN.
INLINE float widen_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t size = (uint32_t)(half & 0x7fff) << 13, exponent = size & 0x0f800000;
  const float small = float_of(size + (113u << 23)) - float_of(113u << 23);
  const float large = float_of(size + (exponent == 0x0f800000 ? 224u << 23 : 112u << 23));
  const float value = exponent ? large : small;
  return half & 0x8000 ? -value : value;
#endif
}

INLINE vector load_halves(const uint16_t *from) {
#if LANES == 16
  return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
  return (vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__) && LANES == 4 && defined(__ARM_NEON)
  return (vector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  vector v;
  for (int i = 0; i < LANES; i++) v[i] = widen_half(from[i]);
  return v;
#endif
}

INLINE vector load_codes(const int8_t *from) {
#if LANES == 16
  return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif LANES == 8
  return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#elif defined(__aarch64__) && LANES == 4 && defined(__ARM_NEON)
  int32_t four;
  memcpy(&four, from, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return (vector)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
  vector v;
  for (int i = 0; i < LANES; i++) v[i] = from[i];
  return v;
#endif
}

// exp(x) for x <= 0, to about one part in a million.
INLINE float exponential(float x) {
  const float t = (x >= -87.0f ? x : -87.0f) * 1.44269504f;
  const int32_t whole = (int32_t)(t - 0.5f);
  const float f = (t - (float)whole) * 0.69314718f;  // within [-0.35, 0.35]
  const float p = 1 + f * (1 + f * (0.5f + f * (0.16666667f + f * (0.041666667f + f * (0.0083333333f + f * 0.0013888889f)))));
  return p * float_of((uint32_t)(whole + 127) << 23);
}
