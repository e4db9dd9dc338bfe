// What a decode step needs and PyTorch has no fast CPU form of: skinny products that add an adapter, and attention of one
// new token over a cache of INT8 and full-precision entries. Each stored byte is read once, and nothing is copied.
//
// native.py compiles this file once per element type: float, or bfloat16 with -DBFLOAT16.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

static inline float widen_bfloat16(uint16_t x) {
  union { uint32_t bits; float value; } both = {(uint32_t)x << 16};
  return both.value;
}

#ifdef BFLOAT16
typedef uint16_t element;
static inline float widen(element x) { return widen_bfloat16(x); }
static inline element narrow(float x) {  // to the nearest, ties to even
  union { float value; uint32_t bits; } both = {x};
  return x == x ? (both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16 : 0x7fc0;
}
#else
typedef float element;
static inline float widen(element x) { return x; }
static inline element narrow(float x) { return x; }
#endif

#define INLINE static inline __attribute__((always_inline))

enum { COLUMNS = 256, DIRECTIONS = 8, SLOTS = 32 };

// z_j = <down_j, x>, for down (rank, in); four directions at a time, so that no sum waits for the one before
INLINE void project(float *z, const element *x, const element *down, int64_t in, int64_t rank) {
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    const element *d0 = down + j * in, *d1 = d0 + in, *d2 = d1 + in, *d3 = d2 + in;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < in; i++) {
      const float x_i = widen(x[i]);
      s0 += widen(d0[i]) * x_i;
      s1 += widen(d1[i]) * x_i;
      s2 += widen(d2[i]) * x_i;
      s3 += widen(d3[i]) * x_i;
    }
    z[j] = s0, z[j + 1] = s1, z[j + 2] = s2, z[j + 3] = s3;
  }
  for (; j < rank; j++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < in; i++) sum += widen(down[j * in + i]) * widen(x[i]);
    z[j] = sum;
  }
}

// y += z^T up for at most COLUMNS columns of up (rank, out); four directions at a time, so that the sums are not loaded and
// stored for each
INLINE void expand(element *y, const float *z, const element *up, int64_t columns, int64_t out, int64_t rank) {
  float sums[COLUMNS] = {0};
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    const element *u0 = up + j * out, *u1 = u0 + out, *u2 = u1 + out, *u3 = u2 + out;
    const float z0 = z[j], z1 = z[j + 1], z2 = z[j + 2], z3 = z[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < columns; i++)
      sums[i] += z0 * widen(u0[i]) + z1 * widen(u1[i]) + z2 * widen(u2[i]) + z3 * widen(u3[i]);
  }
  for (; j < rank; j++) {
    const element *up_j = up + j * out;
    const float z_j = z[j];
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) sums[i] += z_j * widen(up_j[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < columns; i++) y[i] = narrow(widen(y[i]) + sums[i]);
}

// y_t += up^T (g_t * (down x_t)), for the tokens t that `rows` lists or for all.
// y (tokens, out), x (tokens, in), down (rank, in), up (rank, out), gates (tokens, rank) or null for ones.
void add_adapter(element *y, const element *x, const element *down, const element *up, const float *gates,
                 const int64_t *rows, int64_t tokens, int64_t in, int64_t out, int64_t rank, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 1 && tokens * rank * (in + out) > 200000)
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t row = rows ? rows[t] : t;
    float z[rank];
    project(z, x + row * in, down, in, rank);
    for (int64_t j = 0; gates && j < rank; j++) z[j] *= gates[t * rank + j];
    for (int64_t from = 0; from < out; from += COLUMNS)
      expand(y + row * out + from, z, up + from, out - from < COLUMNS ? out - from : COLUMNS, out, rank);
  }
}

// One module of a layer that computes several at once, such as query, key and value: its factors down (r, in) and
// up (r, out), its rank on each rung, and where its columns stand in the layer's output.
typedef struct {
  const element *down, *up;
  const int64_t *ranks;  // (rungs,)
  int64_t out, offset;
} Slice;

// The gate of direction j: the sum of the weights of the rungs up to `top` whose rank is above j.
INLINE float gate_of(const float *weights, const int64_t *ranks, int64_t top, int64_t j) {
  float gate = 0;
  for (int64_t k = top; k >= 0 && ranks[k] > j; k--) gate += weights[k];
  return gate;
}

// What one adapter has in a layer.
typedef struct {
  const Slice *slices;
  int64_t count;
} Layer;

// The tokens of a pass that one adapter runs for: those that `rows` lists, or all. With `weights` (tokens, rungs) their
// directions are gated by them, and no token reads past its own highest rung; without, all take `rung` whole.
typedef struct {
  const float *weights;
  const int64_t *rows;
  int64_t rung, rungs, tokens;
} Part;

// Adds to one layer what a pass runs: y (all tokens, width) += up^T (g_t * (down x_t)) in every slice's columns, for the
// tokens of every part, which share none. Threads share the directions of all parts, then the columns.
void add_parts(element *y, const element *x, const Layer *layers, const Part *parts, int64_t count, int64_t in,
               int64_t width, int threads) {
  int64_t directions[count], groups[count], blocks[count], all_z = 0, all_tokens = 0, work = 0;
  for (int64_t p = 0; p < count; p++) {
    int64_t most = 0;
    directions[p] = blocks[p] = 0;
    for (int64_t s = 0; s < layers[p].count; s++) {
      const Slice slice = layers[p].slices[s];
      const int64_t rank = slice.ranks[parts[p].rung];
      directions[p] += rank;
      blocks[p] += (slice.out + COLUMNS - 1) / COLUMNS;
      most = rank > most ? rank : most;
      work += parts[p].tokens * rank * (in + slice.out);
    }
    groups[p] = (most + DIRECTIONS - 1) / DIRECTIONS;
    all_z += parts[p].tokens * directions[p];
    all_tokens += parts[p].tokens;
  }
  float all[all_z + 1], *z[count + 1];
  int64_t highest[all_tokens + 1], *tops[count + 1];
  z[0] = all, tops[0] = highest;
  for (int64_t p = 0; p < count; p++) {
    const Part part = parts[p];
    z[p + 1] = z[p] + part.tokens * directions[p], tops[p + 1] = tops[p] + part.tokens;
    for (int64_t t = 0; t < part.tokens; t++) {
      tops[p][t] = part.rung;
      while (part.weights && tops[p][t] > 0 && part.weights[t * part.rungs + tops[p][t]] == 0) tops[p][t]--;
    }
  }
#pragma omp parallel num_threads(threads) if (work > 100000)
  {
    for (int64_t p = 0; p < count; p++) {
      const Part part = parts[p];
      const Slice *slices = layers[p].slices;
#pragma omp for collapse(2) schedule(static) nowait
      for (int64_t t = 0; t < part.tokens; t++) {
        for (int64_t g = 0; g < groups[p]; g++) {
          float *z_s = z[p] + t * directions[p];
          for (int64_t s = 0; s < layers[p].count; z_s += slices[s++].ranks[part.rung]) {
            const int64_t from = g * DIRECTIONS, left = slices[s].ranks[tops[p][t]] - from;
            if (left <= 0) continue;
            const int64_t some = left < DIRECTIONS ? left : DIRECTIONS;
            project(z_s + from, x + (part.rows ? part.rows[t] : t) * in, slices[s].down + from * in, in, some);
            for (int64_t j = from; part.weights && j < from + some; j++)
              z_s[j] *= gate_of(part.weights + t * part.rungs, slices[s].ranks, tops[p][t], j);
          }
        }
      }
    }
#pragma omp barrier
    for (int64_t p = 0; p < count; p++) {
      const Part part = parts[p];
      const Slice *slices = layers[p].slices;
#pragma omp for collapse(2) schedule(static) nowait
      for (int64_t t = 0; t < part.tokens; t++) {
        for (int64_t b = 0; b < blocks[p]; b++) {
          int64_t s = 0, from = b * COLUMNS;
          const float *z_s = z[p] + t * directions[p];
          for (; from >= slices[s].out; z_s += slices[s++].ranks[part.rung])
            from -= (slices[s].out + COLUMNS - 1) / COLUMNS * COLUMNS;
          const int64_t left = slices[s].out - from;
          expand(y + (part.rows ? part.rows[t] : t) * width + slices[s].offset + from, z_s, slices[s].up + from,
                 left < COLUMNS ? left : COLUMNS, slices[s].out, slices[s].ranks[tops[p][t]]);
        }
      }
    }
  }
}

// y = x W^T + bias for a few tokens: y (tokens, out), x (tokens, in) already wide, w (out, in), bias (out,) or null. Reads
// and widens W once for every four tokens, where a product that emulates its element type does for each.
void multiply(element *y, const float *x, const element *w, const element *bias, int64_t tokens, int64_t in, int64_t out,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t o = 0; o < out; o++) {
    const element *row = w + o * in;
    const float start = bias ? widen(bias[o]) : 0;
    for (int64_t t = 0; t < tokens; t += 4) {
      const int64_t last = tokens - 1;  // a token past the last is the last once more
      const int64_t at[4] = {t, t + 1 < last ? t + 1 : last, t + 2 < last ? t + 2 : last, t + 3 < last ? t + 3 : last};
      const float *x0 = x + at[0] * in, *x1 = x + at[1] * in, *x2 = x + at[2] * in, *x3 = x + at[3] * in;
      float s0 = start, s1 = start, s2 = start, s3 = start;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < in; i++) {
        const float w_i = widen(row[i]);
        s0 += w_i * x0[i];
        s1 += w_i * x1[i];
        s2 += w_i * x2[i];
        s3 += w_i * x3[i];
      }
      y[at[3] * out + o] = narrow(s3);
      y[at[2] * out + o] = narrow(s2);
      y[at[1] * out + o] = narrow(s1);
      y[at[0] * out + o] = narrow(s0);
    }
  }
}

// Keys or values of one layer: `hot` (batch, heads, hot_room, width), then in the cold pool `codes`
// (batch, int8_heads, cold_room, width) with `scales` (batch, int8_heads, cold_room), and `others`
// (batch, heads - int8_heads, cold_room, width).
typedef struct {
  const element *hot;
  const int8_t *codes;
  const uint16_t *scales;  // bfloat16
  const element *others;
} Pools;

typedef struct {
  int64_t batch, heads, group, width;  // `group` query heads share one of `heads` key-value heads
  int64_t hot, hot_room, cold, cold_room, int8_heads;  // slots in use, and slots there is room for
  const int32_t *places;  // (heads,) where a head stands: p >= 0 in `codes`, otherwise at -1 - p in `others`
} Shape;

// exp(x) for x <= 0 to about one part in a million, in a form that compilers vectorise
static inline float exponential(float x) {
  const float t = (x < -87.0f ? -87.0f : x) * 1.44269504f;
  const int32_t whole = (int32_t)(t - 0.5f);
  const float f = (t - (float)whole) * 0.69314718f;  // within [-0.35, 0.35]
  const float p = 1 + f * (1 + f * (0.5f + f * (0.16666667f + f * (0.041666667f + f * (0.0083333333f + f * 0.0013888889f)))));
  union { int32_t bits; float value; } power = {(whole + 127) << 23};
  return p * power.value;
}

// Row `slot` of a head, cold slots first, as floats in `row`; its scale is returned, not yet applied.
INLINE float load(const Pools *pools, const Shape *s, int64_t width, int64_t b, int64_t h, int64_t slot,
                  float *restrict row) {
  const element *from;
  if (slot >= s->cold) {
    from = pools->hot + ((b * s->heads + h) * s->hot_room + slot - s->cold) * width;
  } else if (s->places[h] >= 0) {
    const int64_t at = (b * s->int8_heads + s->places[h]) * s->cold_room + slot;
    const int8_t *codes = pools->codes + at * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) row[i] = codes[i];
    return widen_bfloat16(pools->scales[at]);
  } else {
    from = pools->others + ((b * (s->heads - s->int8_heads) - 1 - s->places[h]) * s->cold_room + slot) * width;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) row[i] = widen(from[i]);
  return 1;
}

// Attention of the heads that share key-value head h over slots `start` to `end`, one block at a time: a running
// maximum and a sum of exponentials per head, and in `sums` (group, width) the values weighted by them.
INLINE void attend_part(const element *query, const Pools *keys, const Pools *values, const uint8_t *mask, float scaling,
                        const Shape *s, int64_t width, int64_t b, int64_t h, int64_t start, int64_t end, float *peaks,
                        float *totals, float *restrict sums) {
  const int64_t group = s->group;
  float row[width], q[group * width], scores[group * SLOTS];
  for (int64_t i = 0; i < group * width; i++) {
    q[i] = scaling * widen(query[i]);
    sums[i] = 0;
  }
  for (int64_t g = 0; g < group; g++) {
    peaks[g] = -1e30f;
    totals[g] = 0;
  }
  for (int64_t block = start; block < end; block += SLOTS) {
    const int64_t slots = end - block < SLOTS ? end - block : SLOTS;
    for (int64_t n = 0; n < slots; n++) {
      const int hidden = mask && !mask[block + n];
      const float scale = hidden ? 0 : load(keys, s, width, b, h, block + n, row);
      for (int64_t g = 0; g < group; g++) {
        float sum = 0;
        if (!hidden) {
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < width; i++) sum += q[g * width + i] * row[i];
        }
        scores[g * SLOTS + n] = hidden ? -1e30f : sum * scale;
      }
    }
    for (int64_t g = 0; g < group; g++) {
      float *score = scores + g * SLOTS;
      float peak = peaks[g], total = 0;
      for (int64_t n = 0; n < slots; n++) peak = score[n] > peak ? score[n] : peak;
      const float shrink = exponential(peaks[g] - peak);
      if (shrink != 1) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) sums[g * width + i] *= shrink;
      }
#pragma omp simd reduction(+ : total)
      for (int64_t n = 0; n < slots; n++) {
        score[n] = score[n] < -9e29f ? 0 : exponential(score[n] - peak);
        total += score[n];
      }
      totals[g] = totals[g] * shrink + total;
      peaks[g] = peak;
    }
    for (int64_t n = 0; n < slots; n++) {
      if (mask && !mask[block + n]) continue;
      const float scale = load(values, s, width, b, h, block + n, row);
      for (int64_t g = 0; g < group; g++) {
        const float weight = scale * scores[g * SLOTS + n];
#pragma omp simd
        for (int64_t i = 0; i < width; i++) sums[g * width + i] += weight * row[i];
      }
    }
  }
}

// output and query (batch, heads * group, width); mask (batch, cold + hot) bytes, at `mask_stride`, or null.
// The slots of a head are cut into `parts`, whose results are put together by their maxima. Returns 0, or 1 without
// memory.
int attend(element *output, const element *query, const Pools *keys, const Pools *values, const uint8_t *mask,
           int64_t mask_stride, float scaling, const Shape *s, int64_t parts, int threads) {
  const int64_t cells = s->batch * s->heads, slots = s->cold + s->hot, span = s->group * s->width;
  float *sums = malloc(cells * parts * (span + 2 * s->group) * sizeof(float));
  if (!sums) return 1;
  float *peaks = sums + cells * parts * span, *totals = peaks + cells * parts * s->group;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t task = 0; task < cells * parts; task++) {
    const int64_t cell = task / parts, part = task % parts, b = cell / s->heads;
#define ATTEND(width)                                                                                                 \
  attend_part(query + cell * span, keys, values, mask ? mask + b * mask_stride : 0, scaling, s, width, b,             \
              cell % s->heads, slots * part / parts, slots * (part + 1) / parts, peaks + task * s->group,             \
              totals + task * s->group, sums + task * span)
    switch (s->width) {  // known widths let the compiler keep rows in registers
      case 64: ATTEND(64); break;
      case 128: ATTEND(128); break;
      default: ATTEND(s->width);
    }
  }
  for (int64_t cell = 0; cell < cells; cell++) {
    for (int64_t g = 0; g < s->group; g++) {
      const int64_t first = cell * parts * s->group + g;
      float peak = -1e30f, total = 0;
      for (int64_t p = 0; p < parts; p++) peak = fmaxf(peak, peaks[first + p * s->group]);
      float row[s->width];
      for (int64_t i = 0; i < s->width; i++) row[i] = 0;
      for (int64_t p = 0; p < parts; p++) {
        const float weight = exponential(peaks[first + p * s->group] - peak);
        const float *part = sums + (cell * parts + p) * span + g * s->width;
        total += weight * totals[first + p * s->group];
        for (int64_t i = 0; i < s->width; i++) row[i] += weight * part[i];
      }
      const float share = total > 0 ? 1 / total : 0;  // no slot at all: nothing, as sdpa gives
      for (int64_t i = 0; i < s->width; i++) output[cell * span + g * s->width + i] = narrow(row[i] * share);
    }
  }
  free(sums);
  return 0;
}
