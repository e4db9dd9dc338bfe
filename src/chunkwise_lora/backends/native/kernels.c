// The parts of a decode step for which PyTorch has no fast CPU code: skinny products that add adapters, and attention of
// one new token over a cache of INT8 and full-precision entries. Each stored byte is read once, and nothing is copied.
//
// typed.h holds the kernels. It is included once per element type, so one library serves float32, bfloat16 and float16.
// bfloat16_dot.h holds the product of many tokens, for processors that multiply bfloat16 numbers directly.
// No kernel keeps arrays of unbounded size on the stack. Every kernel returns one of the codes below.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { DONE, NO_MEMORY, BAD_ROWS, BAD_RUNG, BAD_SLICE, BAD_CACHE };
enum { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };  // element types, as a Slice names them
enum { COLUMNS = 256, DIRECTIONS = 8, SLOTS = 32, KNOWN_WIDTH = 256, SMALL = 4096, PARALLEL_WORK = 100000 };
enum { MANY_TOKENS = 16 };  // from this number of tokens on, a segment runs in blocks, where there is a kernel for it

#define INLINE static inline __attribute__((always_inline))

// One module of a layer (a layer may compute several at once, such as query, key and value): its factors down (rank, in)
// and up (rank, out), its rank on each rung, and its first column in the layer's output.
typedef struct {
  const void *down, *up;
  const int64_t *ranks;  // (rungs,), ascending, at most `rank`
  int64_t out, offset, in, rank, rungs, element;
} Slice;

// The modules that one adapter has in a layer.
typedef struct {
  const Slice *slices;
  int64_t count;
} Layer;

// The tokens of a pass that one adapter runs for: those that `rows` (tokens,) lists, or the first `tokens`. With `weights`
// (tokens, rungs), their directions are gated, and no token reads directions above its own highest rung. Without, all
// tokens use all directions of `rung`.
typedef struct {
  const float *weights;
  const int64_t *rows;
  int64_t rung, rungs, tokens;
} Segment;

// Keys or values of one layer: `hot` (batch, heads, hot_room, width), and in the cold pool `codes`
// (batch, int8_heads, cold_room, width) with `scales` (batch, int8_heads, cold_room), and `others`
// (batch, heads - int8_heads, cold_room, width).
typedef struct {
  const void *hot;
  const int8_t *codes;
  const uint16_t *scales;  // bfloat16
  const void *others;
} Pools;

typedef struct {
  int64_t batch, heads, group, width;  // `group` query heads share one of `heads` key-value heads
  int64_t hot, hot_room, cold, cold_room, int8_heads;  // slots in use, and slots there is room for
  const int32_t *places;  // (heads,) where a head is stored: p >= 0 in `codes`, p < 0 at -1 - p in `others`
} Shape;

// Attention over some of the slots: per head the largest score, the sum of the exponentials, and the weighted values.
typedef struct {
  float *peaks, *totals, *sums;  // (group,), (group,), (group, width)
} Partial;

// Where the intermediate results of one segment are, and how many of its tokens run here.
typedef struct {
  float *z;       // (tokens, directions)
  int64_t *tops;  // (tokens,) the highest rung that each token uses
  int64_t tokens, directions, groups, blocks;
} Run;

INLINE float float_of(uint32_t bits) {
  union { uint32_t bits; float value; } both = {bits};
  return both.value;
}

INLINE uint32_t bits_of(float value) {
  union { float value; uint32_t bits; } both = {value};
  return both.bits;
}

INLINE float widen_float32(float x) { return x; }
INLINE float narrow_float32(float x) { return x; }

INLINE float widen_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

// To the nearest, ties to even.
INLINE uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// GCC does not vectorise conversions of _Float16 on x86, but it does vectorise the portable form.
#if defined(__FLT16_MAX__) && !defined(PORTABLE_FLOAT16) && \
    (defined(__aarch64__) || (defined(__F16C__) && defined(__clang__)))
typedef _Float16 half;
INLINE float widen_float16(half x) { return x; }
INLINE half narrow_float16(float x) { return (half)x; }
#else
typedef uint16_t half;

// Exact. Neither branch uses a subnormal float, which some processors are set to read as zero.
INLINE float widen_float16(half x) {
  const uint32_t size = (uint32_t)(x & 0x7fff) << 13, exponent = size & 0x0f800000;
  const float small = float_of(size + (113u << 23)) - float_of(113u << 23);
  const uint32_t large = size + (exponent == 0x0f800000 ? 224u << 23 : 112u << 23);
  return float_of((exponent ? large : bits_of(small)) | (uint32_t)(x & 0x8000) << 16);
}

// To the nearest, ties to even.
INLINE half narrow_float16(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
  const uint32_t beyond = size > 0x7f800000 ? 0x7e00 : 0x7c00;                     // NaN, or too large
  const uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);           // the addition rounds
  const uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const uint32_t chosen = size >= (143u << 23) ? beyond : size < (113u << 23) ? small : normal;
  return chosen | ((bits >> 16) & 0x8000);
}
#endif

// exp(x) for x <= 0 to about one part in a million, in a form that compilers vectorise. NaN gives NaN.
INLINE float exponential(float x) {
  const float t = (x >= -87.0f ? x : -87.0f) * 1.44269504f;
  const int32_t whole = (int32_t)(t - 0.5f);
  const float f = (t - (float)whole) * 0.69314718f;  // within [-0.35, 0.35]
  const float p = 1 + f * (1 + f * (0.5f + f * (0.16666667f + f * (0.041666667f + f * (0.0083333333f + f * 0.0013888889f)))));
  return x == x ? p * float_of((uint32_t)(whole + 127) << 23) : x;
}

// The factor for sums relative to the maximum `from` when the maximum becomes `to`. Minus infinity means no slot yet.
INLINE float shrinkage(float from, float to) { return from == to ? 1 : exponential(from - to); }

// The gate of direction j: the sum of the weights of the rungs up to `top` whose rank is above j.
INLINE float gate_of(const float *weights, const int64_t *ranks, int64_t top, int64_t j) {
  float gate = 0;
  for (int64_t k = top; k >= 0 && ranks[k] > j; k--) gate += weights[k];
  return gate;
}

// Checks that a segment and its adapter's modules in a layer stay within x (tokens, in) and y (tokens, width).
static int check(const Layer *layer, const Segment *segment, int64_t tokens, int64_t in, int64_t width, int64_t element) {
  if (segment->tokens < 0 || (!segment->rows && segment->tokens > tokens)) return BAD_ROWS;
  for (int64_t t = 0; segment->rows && t < segment->tokens; t++)
    if (segment->rows[t] < 0 || segment->rows[t] >= tokens) return BAD_ROWS;
  if (segment->rung < 0 || (segment->weights && segment->rung >= segment->rungs)) return BAD_RUNG;
  for (int64_t s = 0; s < layer->count; s++) {
    const Slice *slice = layer->slices + s;
    if (slice->out < 0 || slice->offset < 0 || slice->out > width - slice->offset) return BAD_SLICE;
    if (slice->in != in || slice->element != element) return BAD_SLICE;
    if (segment->rung >= slice->rungs) return BAD_RUNG;
  }
  return DONE;
}

// Checks that the places of all heads and the slots in use are within the pools.
static int check_cache(const Shape *s) {
  if (s->hot < 0 || s->hot > s->hot_room || s->cold < 0 || s->cold > s->cold_room) return BAD_CACHE;
  for (int64_t h = 0; s->cold && h < s->heads; h++)
    if (s->places[h] >= s->int8_heads || -1 - s->places[h] >= s->heads - s->int8_heads) return BAD_CACHE;
  return DONE;
}

// On processors with AMX, PyTorch's products use it and are likely to be faster.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define BFLOAT16_DOT 1
#include "bfloat16_dot.h"
#else
#define BFLOAT16_DOT 0
#endif

#define NAMED(name) name##_float32
#define ELEMENT float
#define ELEMENT_CODE FLOAT32
#include "typed.h"

#define NAMED(name) name##_bfloat16
#define ELEMENT uint16_t
#define ELEMENT_CODE BFLOAT16
#include "typed.h"

#define NAMED(name) name##_float16
#define ELEMENT half
#define ELEMENT_CODE FLOAT16
#include "typed.h"
