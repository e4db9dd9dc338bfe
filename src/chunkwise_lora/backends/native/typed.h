// The kernels for one element type, which kernels.c names by ELEMENT, ELEMENT_CODE and NAMED before it includes this file.
// Sums are in float32. The loops take four directions or tokens at a time, so that sums do not wait for each other.
#define WIDEN NAMED(widen)
#define NARROW NAMED(narrow)

// z_j = <down_j, x>, for down (rank, in).
INLINE void NAMED(project)(float *z, const ELEMENT *x, const ELEMENT *down, int64_t in, int64_t rank) {
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    const ELEMENT *d0 = down + j * in, *d1 = d0 + in, *d2 = d1 + in, *d3 = d2 + in;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < in; i++) {
      const float x_i = WIDEN(x[i]);
      s0 += WIDEN(d0[i]) * x_i;
      s1 += WIDEN(d1[i]) * x_i;
      s2 += WIDEN(d2[i]) * x_i;
      s3 += WIDEN(d3[i]) * x_i;
    }
    z[j] = s0, z[j + 1] = s1, z[j + 2] = s2, z[j + 3] = s3;
  }
  for (; j < rank; j++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < in; i++) sum += WIDEN(down[j * in + i]) * WIDEN(x[i]);
    z[j] = sum;
  }
}

// y += z^T up for at most COLUMNS columns of up (rank, out). The sums stay in a block of the stack.
INLINE void NAMED(expand)(ELEMENT *y, const float *z, const ELEMENT *up, int64_t columns, int64_t out, int64_t rank) {
  float sums[COLUMNS] = {0};
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    const ELEMENT *u0 = up + j * out, *u1 = u0 + out, *u2 = u1 + out, *u3 = u2 + out;
    const float z0 = z[j], z1 = z[j + 1], z2 = z[j + 2], z3 = z[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < columns; i++)
      sums[i] += z0 * WIDEN(u0[i]) + z1 * WIDEN(u1[i]) + z2 * WIDEN(u2[i]) + z3 * WIDEN(u3[i]);
  }
  for (; j < rank; j++) {
    const ELEMENT *up_j = up + j * out;
    const float z_j = z[j];
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) sums[i] += z_j * WIDEN(up_j[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < columns; i++) y[i] = NARROW(WIDEN(y[i]) + sums[i]);
}

// The work of one thread for `add_segments`: the threads share the directions of all segments, then the columns.
static __attribute__((noinline)) void NAMED(run_segments)(ELEMENT *y, const ELEMENT *x, const Layer *layers,
                                                          const Segment *segments, const Run *runs, int64_t count,
                                                          int64_t in, int64_t width) {
  for (int64_t p = 0; p < count; p++) {
    const Segment segment = segments[p];
    const Run run = runs[p];
    const Slice *slices = layers[p].slices;
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t t = 0; t < run.tokens; t++) {
      for (int64_t g = 0; g < run.groups; g++) {
        float *z = run.z + t * run.directions;
        for (int64_t s = 0; s < layers[p].count; z += slices[s++].ranks[segment.rung]) {
          const int64_t from = g * DIRECTIONS, left = slices[s].ranks[run.tops[t]] - from;
          if (left <= 0) continue;
          const int64_t some = left < DIRECTIONS ? left : DIRECTIONS;
          NAMED(project)(z + from, x + (segment.rows ? segment.rows[t] : t) * in,
                         (const ELEMENT *)slices[s].down + from * in, in, some);
          for (int64_t j = from; segment.weights && j < from + some; j++)
            z[j] *= gate_of(segment.weights + t * segment.rungs, slices[s].ranks, run.tops[t], j);
        }
      }
    }
  }
#pragma omp barrier
  for (int64_t p = 0; p < count; p++) {
    const Segment segment = segments[p];
    const Run run = runs[p];
    const Slice *slices = layers[p].slices;
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t t = 0; t < run.tokens; t++) {
      for (int64_t b = 0; b < run.blocks; b++) {
        int64_t s = 0, from = b * COLUMNS;
        const float *z = run.z + t * run.directions;
        for (; from >= slices[s].out; z += slices[s++].ranks[segment.rung])
          from -= (slices[s].out + COLUMNS - 1) / COLUMNS * COLUMNS;
        const int64_t left = slices[s].out - from;
        NAMED(expand)(y + (segment.rows ? segment.rows[t] : t) * width + slices[s].offset + from, z,
                      (const ELEMENT *)slices[s].up + from, left < COLUMNS ? left : COLUMNS, slices[s].out,
                      slices[s].ranks[run.tops[t]]);
      }
    }
  }
}

// Whether segments of MANY_TOKENS and more run in blocks, if the number of inputs is even.
const int NAMED(has_blocks) = BFLOAT16_DOT && ELEMENT_CODE == BFLOAT16;

// Adds the adapter product of a pass to one layer: y (tokens, width) += up^T (g_t * (down x_t)) in the columns of every
// slice, for the tokens of every segment. No token is in two segments. x is (tokens, in).
int NAMED(add_segments)(ELEMENT *y, const ELEMENT *x, const Layer *layers, const Segment *segments, int64_t count,
                        int64_t tokens, int64_t in, int64_t width, int threads) {
  int64_t numbers = 0, few_tokens = 0, few_work = 0, many_work = 0;
  for (int64_t p = 0; p < count; p++) {
    const int bad = check(layers + p, segments + p, tokens, in, width, ELEMENT_CODE);
    if (bad) return bad;
    const int few = !NAMED(has_blocks) || in % 2 || segments[p].tokens < MANY_TOKENS;
    few_tokens += few ? segments[p].tokens : 0;
    for (int64_t s = 0; s < layers[p].count; s++) {
      const Slice *slice = layers[p].slices + s;
      const int64_t directions = segments[p].tokens * slice->ranks[segments[p].rung];
      numbers += few ? directions : 0;
      *(few ? &few_work : &many_work) += directions * (in + slice->out);
    }
  }
#if BFLOAT16_DOT
  if (many_work) {
    const int failed = add_many((uint16_t *)y, (const uint16_t *)x, layers, segments, count, in, width,
                                many_work > PARALLEL_WORK ? threads : 1);
    if (failed) return failed;
  }
#endif
  if (!few_work) return DONE;
  int64_t small[SMALL / sizeof(int64_t)];
  const size_t bytes = count * sizeof(Run) + few_tokens * sizeof(int64_t) + numbers * sizeof(float);
  Run *runs = bytes <= sizeof small ? (Run *)small : malloc(bytes);
  if (!runs) return NO_MEMORY;
  int64_t *tops = (int64_t *)(runs + count);
  float *z = (float *)(tops + few_tokens);
  for (int64_t p = 0; p < count; p++) {
    const Segment segment = segments[p];
    const int few = !NAMED(has_blocks) || in % 2 || segment.tokens < MANY_TOKENS;
    Run run = {z, tops, few ? segment.tokens : 0, 0, 0, 0};
    for (int64_t s = 0; s < layers[p].count; s++) {
      const Slice *slice = layers[p].slices + s;
      const int64_t rank = slice->ranks[segment.rung], groups = (rank + DIRECTIONS - 1) / DIRECTIONS;
      run.directions += rank;
      run.blocks += (slice->out + COLUMNS - 1) / COLUMNS;
      run.groups = groups > run.groups ? groups : run.groups;
    }
    for (int64_t t = 0; t < run.tokens; t++) {
      tops[t] = segment.rung;
      while (segment.weights && tops[t] > 0 && segment.weights[t * segment.rungs + tops[t]] == 0) tops[t]--;
    }
    z += run.tokens * run.directions, tops += run.tokens;
    runs[p] = run;
  }
  if (threads > 1 && few_work > PARALLEL_WORK) {
#pragma omp parallel num_threads(threads)
    NAMED(run_segments)(y, x, layers, segments, runs, count, in, width);
  } else {
    NAMED(run_segments)(y, x, layers, segments, runs, count, in, width);
  }
  if ((void *)runs != (void *)small) free(runs);
  return DONE;
}

// y = x W^T + bias for a few tokens: y (tokens, out), x (tokens, in) in float32, w (out, in), bias (out,) or null. It
// reads and widens W once for every four tokens; PyTorch's emulated product does so for every token.
int NAMED(multiply)(ELEMENT *y, const float *x, const ELEMENT *w, const ELEMENT *bias, int64_t tokens, int64_t in,
                    int64_t out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * in * out > PARALLEL_WORK)
  for (int64_t o = 0; o < out; o++) {
    const ELEMENT *row = w + o * in;
    const float start = bias ? WIDEN(bias[o]) : 0;
    for (int64_t t = 0; t < tokens; t += 4) {
      const int64_t last = tokens - 1;  // past the end, the last token is computed again
      const int64_t at[4] = {t, t + 1 < last ? t + 1 : last, t + 2 < last ? t + 2 : last, t + 3 < last ? t + 3 : last};
      const float *x0 = x + at[0] * in, *x1 = x + at[1] * in, *x2 = x + at[2] * in, *x3 = x + at[3] * in;
      float s0 = start, s1 = start, s2 = start, s3 = start;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < in; i++) {
        const float w_i = WIDEN(row[i]);
        s0 += w_i * x0[i];
        s1 += w_i * x1[i];
        s2 += w_i * x2[i];
        s3 += w_i * x3[i];
      }
      y[at[3] * out + o] = NARROW(s3);
      y[at[2] * out + o] = NARROW(s2);
      y[at[1] * out + o] = NARROW(s1);
      y[at[0] * out + o] = NARROW(s0);
    }
  }
  return DONE;
}

// Row `slot` of a head, cold slots first, as floats in `row`. Its scale is returned and not yet applied.
INLINE float NAMED(load)(const Pools *pools, const Shape *s, int64_t width, int64_t b, int64_t h, int64_t slot,
                         float *restrict row) {
  const ELEMENT *from;
  if (slot >= s->cold) {
    from = (const ELEMENT *)pools->hot + ((b * s->heads + h) * s->hot_room + slot - s->cold) * width;
  } else if (s->places[h] >= 0) {
    const int64_t at = (b * s->int8_heads + s->places[h]) * s->cold_room + slot;
    const int8_t *codes = pools->codes + at * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) row[i] = codes[i];
    return widen_bfloat16(pools->scales[at]);
  } else {
    from = (const ELEMENT *)pools->others +
           ((b * (s->heads - s->int8_heads) - 1 - s->places[h]) * s->cold_room + slot) * width;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; i++) row[i] = WIDEN(from[i]);
  return 1;
}

// Attention of the query heads that share key-value head h, over slots `start` to `end`, one block at a time. `work` has
// room for q (group, width), scores (group, SLOTS) and a row (width,).
INLINE void NAMED(attend_slots)(const ELEMENT *query, const Pools *keys, const Pools *values, const uint8_t *mask,
                                float scaling, const Shape *s, int64_t width, int64_t b, int64_t h, int64_t start,
                                int64_t end, Partial to, float *restrict work) {
  const int64_t group = s->group;
  float *restrict q = work, *restrict scores = q + group * width, *restrict sums = to.sums;
  float block_row[KNOWN_WIDTH], *row = width <= KNOWN_WIDTH ? block_row : scores + group * SLOTS;
  for (int64_t i = 0; i < group * width; i++) {
    q[i] = scaling * WIDEN(query[i]);
    sums[i] = 0;
  }
  for (int64_t g = 0; g < group; g++) {
    to.peaks[g] = -INFINITY;
    to.totals[g] = 0;
  }
  for (int64_t block = start; block < end; block += SLOTS) {
    const int64_t slots = end - block < SLOTS ? end - block : SLOTS;
    for (int64_t n = 0; n < slots; n++) {
      const int hidden = mask && !mask[block + n];
      const float scale = hidden ? 0 : NAMED(load)(keys, s, width, b, h, block + n, row);
      for (int64_t g = 0; g < group; g++) {
        float sum = 0;
        if (!hidden) {
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < width; i++) sum += q[g * width + i] * row[i];
        }
        scores[g * SLOTS + n] = hidden ? -INFINITY : sum * scale;
      }
    }
    for (int64_t g = 0; g < group; g++) {
      float *score = scores + g * SLOTS;
      float peak = to.peaks[g], total = 0;
      for (int64_t n = 0; n < slots; n++) peak = score[n] > peak ? score[n] : peak;
      const float shrink = shrinkage(to.peaks[g], peak);
      if (shrink != 1) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) sums[g * width + i] *= shrink;
      }
#pragma omp simd reduction(+ : total)
      for (int64_t n = 0; n < slots; n++) {
        score[n] = score[n] == -INFINITY ? 0 : exponential(score[n] - peak);
        total += score[n];
      }
      to.totals[g] = to.totals[g] * shrink + total;
      to.peaks[g] = peak;
    }
    for (int64_t n = 0; n < slots; n++) {
      if (mask && !mask[block + n]) continue;
      const float scale = NAMED(load)(values, s, width, b, h, block + n, row);
      for (int64_t g = 0; g < group; g++) {
        const float weight = scale * scores[g * SLOTS + n];
#pragma omp simd
        for (int64_t i = 0; i < width; i++) sums[g * width + i] += weight * row[i];
      }
    }
  }
}

// The work of one thread for `attend`: some of the pieces of all heads. `work` is for this thread.
static __attribute__((noinline)) void NAMED(attend_pieces)(const ELEMENT *query, const Pools *keys, const Pools *values,
                                                           const uint8_t *mask, int64_t mask_stride, float scaling,
                                                           const Shape *s, int64_t pieces, Partial all, float *work) {
  const int64_t slots = s->cold + s->hot, span = s->group * s->width;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < s->batch * s->heads * pieces; task++) {
    const int64_t cell = task / pieces, piece = task % pieces, b = cell / s->heads;
    const Partial to = {all.peaks + task * s->group, all.totals + task * s->group, all.sums + task * span};
#define ATTEND(width)                                                                                            \
  NAMED(attend_slots)(query + cell * span, keys, values, mask ? mask + b * mask_stride : 0, scaling, s, width, b, \
                      cell % s->heads, slots * piece / pieces, slots * (piece + 1) / pieces, to, work)
    switch (s->width) {  // known widths let the compiler keep rows in registers
      case 64: ATTEND(64); break;
      case 128: ATTEND(128); break;
      default: ATTEND(s->width);
    }
#undef ATTEND
  }
}

// output and query (batch, heads * group, width); mask (batch, cold + hot) bytes, `mask_stride` apart, or null.
// The slots of a head are cut into `pieces`, whose results are combined by their maxima.
int NAMED(attend)(ELEMENT *output, const ELEMENT *query, const Pools *keys, const Pools *values, const uint8_t *mask,
                  int64_t mask_stride, float scaling, const Shape *s, int64_t pieces, int threads) {
  const int bad = check_cache(s);
  if (bad) return bad;
  const int64_t cells = s->batch * s->heads, tasks = cells * pieces, span = s->group * s->width;
  const int64_t per_thread = (span + s->group * SLOTS + s->width + 15) / 16 * 16;
  float *sums = malloc((threads * per_thread + tasks * (span + 2 * s->group)) * sizeof(float));
  if (!sums) return NO_MEMORY;
  const Partial all = {sums + tasks * span, sums + tasks * (span + s->group), sums};
  float *work = sums + tasks * (span + 2 * s->group);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    NAMED(attend_pieces)(query, keys, values, mask, mask_stride, scaling, s, pieces, all,
                         work + omp_get_thread_num() * per_thread);
  } else
#endif
    NAMED(attend_pieces)(query, keys, values, mask, mask_stride, scaling, s, pieces, all, work);
  for (int64_t cell = 0; cell < cells; cell++) {
    for (int64_t g = 0; g < s->group; g++) {
      const int64_t first = cell * pieces * s->group + g;
      float *row = sums + cell * pieces * span + g * s->width;
      float peak = -INFINITY, total = 0;
      for (int64_t p = 0; p < pieces; p++) peak = fmaxf(peak, all.peaks[first + p * s->group]);
      for (int64_t p = 0; p < pieces; p++) {
        const float weight = shrinkage(all.peaks[first + p * s->group], peak);
        total += weight * all.totals[first + p * s->group];
        for (int64_t i = 0; i < s->width; i++) row[i] = (p ? row[i] : 0) + weight * row[p * span + i];
      }
      const float share = total == 0 ? 0 : 1 / total;  // if no slot is visible, the result is zero, as in PyTorch
      for (int64_t i = 0; i < s->width; i++) output[cell * span + g * s->width + i] = NARROW(row[i] * share);
    }
  }
  free(sums);
  return DONE;
}

#undef NAMED
#undef ELEMENT
#undef ELEMENT_CODE
#undef WIDEN
#undef NARROW
