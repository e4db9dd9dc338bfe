// The adapter product for many tokens in bfloat16, by the processor's instructions that multiply pairs of bfloat16 numbers
// and add both products to a float32. BLOCK tokens at a time pass through both factors, so x is read once, y is read and
// written once, and nothing else goes to memory.
#include <immintrin.h>
#include <string.h>

enum { BLOCK = 8, LANES = 16 };

// The directions of one slice that a segment uses, repacked so that a vector holds what one instruction reads.
typedef struct {
  uint32_t *down;  // (groups, in / 2, LANES) pairs of inputs of LANES directions, with zeros above the rank
  uint32_t *up;    // (pairs, columns) pairs of directions of each output
  int64_t rank, groups, pairs, columns;  // `columns` is a multiple of 2 * LANES
} Packed;

static Packed packed_sizes(const Slice *slice, int64_t rung) {
  const int64_t rank = slice->ranks[rung];
  return (Packed){0, 0, rank, (rank + LANES - 1) / LANES, (rank + 1) / 2,
                  (slice->out + 2 * LANES - 1) / (2 * LANES) * (2 * LANES)};
}

// Bytes of a packed slice.
static size_t packed_bytes(const Packed *packed, int64_t in) {
  return (packed->groups * (in / 2) * LANES + packed->pairs * packed->columns) * sizeof(uint32_t);
}

static void pack(const Slice *slice, const Packed *to) {
  const int64_t inputs = slice->in / 2;
  const uint16_t *down = slice->down, *up = slice->up;
  for (int64_t j = 0; j < to->groups * LANES; j++) {
    uint32_t *lane = to->down + j / LANES * inputs * LANES + j % LANES;
    for (int64_t i = 0; i < inputs; i++) {
      lane[i * LANES] = 0;
      if (j < to->rank) memcpy(lane + i * LANES, down + j * slice->in + 2 * i, sizeof *lane);
    }
  }
  for (int64_t p = 0; p < to->pairs; p++) {
    const uint16_t *even = up + 2 * p * slice->out, *odd = 2 * p + 1 < to->rank ? even + slice->out : 0;
    uint32_t *row = to->up + p * to->columns;
    for (int64_t i = 0; i < slice->out; i++) row[i] = even[i] | (odd ? (uint32_t)odd[i] << 16 : 0);
    for (int64_t i = slice->out; i < to->columns; i++) row[i] = 0;
  }
}

INLINE __m512bh pair(const uint16_t *numbers) {
  int32_t bits;
  memcpy(&bits, numbers, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// The lanes below `count`.
INLINE __mmask16 lanes(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// The gates of the LANES directions from `first` on: each rung adds its weight to the directions below its rank.
INLINE __m512 gates_of(const float *weights, const int64_t *ranks, int64_t rung, int64_t first) {
  __m512 gates = _mm512_setzero_ps();
  for (int64_t k = 0; k <= rung; k++)
    if (weights[k] != 0) gates = _mm512_mask_add_ps(gates, lanes(ranks[k] - first), gates, _mm512_set1_ps(weights[k]));
  return gates;
}

// z (BLOCK, groups * LANES) = g * (down x) in bfloat16, for the rows x of a block and their weights (or null).
INLINE void project_block(uint16_t *z, const uint16_t *const *x, const float *const *weights, const Packed *packed,
                          const int64_t *ranks, int64_t rung, int64_t in) {
  for (int64_t g = 0; g < packed->groups; g++) {
    const uint32_t *down = packed->down + g * (in / 2) * LANES;
    __m512 sums[BLOCK];
    for (int t = 0; t < BLOCK; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t i = 0; i < in / 2; i++) {
      const __m512bh factors = (__m512bh)_mm512_loadu_si512(down + i * LANES);
#pragma GCC unroll 8
      for (int t = 0; t < BLOCK; t++) sums[t] = _mm512_dpbf16_ps(sums[t], factors, pair(x[t] + 2 * i));
    }
    for (int t = 0; t < BLOCK; t++) {
      __m512 sum = _mm512_maskz_mov_ps(lanes(packed->rank - g * LANES), sums[t]);
      if (weights) sum = _mm512_mul_ps(sum, gates_of(weights[t], ranks, rung, g * LANES));
      const __m256bh narrow = _mm512_cvtneps_pbh(sum);
      memcpy(z + (t * packed->groups + g) * LANES, &narrow, sizeof narrow);
    }
  }
}

INLINE __m512 load_outputs(const uint16_t *y, __mmask16 inside) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, y)), 16));
}

INLINE void store_outputs(uint16_t *y, __mmask16 inside, __m512 sum) {
  _mm256_mask_storeu_epi16(y, inside, (__m256i)_mm512_cvtneps_pbh(sum));
}

// y += z^T up for the rows y of a block. A row may be listed more than once, since all rows are read before they are
// written.
INLINE void expand_block(uint16_t *const *y, const uint16_t *z, const Packed *packed, int64_t out) {
  for (int64_t column = 0; column < out; column += 2 * LANES) {
    const __mmask16 left = lanes(out - column), right = lanes(out - column - LANES);
    __m512 sums[BLOCK][2];
#pragma GCC unroll 8
    for (int t = 0; t < BLOCK; t++) {
      sums[t][0] = load_outputs(y[t] + column, left);
      sums[t][1] = load_outputs(y[t] + column + LANES, right);
    }
    for (int64_t p = 0; p < packed->pairs; p++) {
      const uint32_t *up = packed->up + p * packed->columns + column;
      const __m512bh first = (__m512bh)_mm512_loadu_si512(up), second = (__m512bh)_mm512_loadu_si512(up + LANES);
#pragma GCC unroll 8
      for (int t = 0; t < BLOCK; t++) {
        const __m512bh hidden = pair(z + t * packed->groups * LANES + 2 * p);
        sums[t][0] = _mm512_dpbf16_ps(sums[t][0], first, hidden);
        sums[t][1] = _mm512_dpbf16_ps(sums[t][1], second, hidden);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < BLOCK; t++) {
      store_outputs(y[t] + column, left, sums[t][0]);
      store_outputs(y[t] + column + LANES, right, sums[t][1]);
    }
  }
}

// The work of one thread for `add_many`: some blocks of every segment that has many tokens. `z` is for this thread.
static __attribute__((noinline)) void run_blocks(uint16_t *y, const uint16_t *x, const Layer *layers,
                                                 const Segment *segments, int64_t count, const Packed *packed, int64_t in,
                                                 int64_t width, uint16_t *z) {
  for (int64_t p = 0; p < count; packed += layers[p++].count) {
    const Segment segment = segments[p];
    if (segment.tokens < MANY_TOKENS) continue;
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < segment.tokens; block += BLOCK) {
      const uint16_t *inputs[BLOCK];
      const float *weights[BLOCK];
      uint16_t *outputs[BLOCK];
      for (int64_t s = 0; s < layers[p].count; s++) {
        const Slice *slice = layers[p].slices + s;
        for (int64_t t = 0; t < BLOCK; t++) {
          const int64_t token = block + t < segment.tokens ? block + t : segment.tokens - 1;  // past the end, the last one
          const int64_t row = segment.rows ? segment.rows[token] : token;
          inputs[t] = x + row * in;
          outputs[t] = y + row * width + slice->offset;
          weights[t] = segment.weights + token * segment.rungs;
        }
        project_block(z, inputs, segment.weights ? weights : 0, packed + s, slice->ranks, segment.rung, in);
        expand_block(outputs, z, packed + s, slice->out);
      }
    }
  }
}

// `add_segments` for the segments that have many tokens. The arguments have been checked, and `in` is even.
static int add_many(uint16_t *y, const uint16_t *x, const Layer *layers, const Segment *segments, int64_t count, int64_t in,
                    int64_t width, int threads) {
  int64_t slices = 0, groups = 1;
  size_t bytes = 0;
  for (int64_t p = 0; p < count; p++) {
    for (int64_t s = 0; s < layers[p].count && segments[p].tokens >= MANY_TOKENS; s++) {
      const Packed sizes = packed_sizes(layers[p].slices + s, segments[p].rung);
      bytes += packed_bytes(&sizes, in);
      groups = sizes.groups > groups ? sizes.groups : groups;
    }
    slices += layers[p].count;
  }
  const int64_t hidden = BLOCK * groups * LANES;
  char *memory = malloc(slices * sizeof(Packed) + bytes + threads * hidden * sizeof(uint16_t));
  if (!memory) return NO_MEMORY;
  Packed *packed = (Packed *)memory, *next = packed;
  uint32_t *factors = (uint32_t *)(packed + slices);
  for (int64_t p = 0; p < count; p++) {
    for (int64_t s = 0; s < layers[p].count; s++, next++) {
      if (segments[p].tokens < MANY_TOKENS) continue;
      *next = packed_sizes(layers[p].slices + s, segments[p].rung);
      next->down = factors;
      next->up = factors + next->groups * (in / 2) * LANES;
      factors += packed_bytes(next, in) / sizeof *factors;
      pack(layers[p].slices + s, next);
    }
  }
  uint16_t *z = (uint16_t *)factors;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    run_blocks(y, x, layers, segments, count, packed, in, width, z + omp_get_thread_num() * hidden);
  } else
#endif
    run_blocks(y, x, layers, segments, count, packed, in, width, z);
  free(memory);
  return DONE;
}
