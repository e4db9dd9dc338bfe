// Attention of one new token: each key and value is read once for all query heads that share it, and hidden cells are not
// read. Threads share the cells; the one that finishes last combines what they found.
enum { HEADS = 4, CELLS = 32 };  // query heads and cells that are computed together
enum { HIDDEN = 0xFC00 };        // minus infinity in float16: the mask of a cell that the token does not see

// ggml's block of a q8_0 row.
typedef struct {
  uint16_t scale;
  int8_t codes[32];
} Q8Block;

// What attention over some of the cells found for a query head: the largest score, the sum of the exponentials relative to
// it, and the values (width,) weighted by them.
typedef struct {
  float peak, total, values[];
} Partial;

INLINE Partial *partial_at(float *partials, int64_t i, int64_t width) { return (Partial *)(partials + i * (width + 2)); }

// Some cells of one key-value head, and the query heads that read them.
typedef struct {
  const char *query, *keys, *values;  // of the first query head, and of cell 0
  size_t query_stride, key_stride, value_stride;
  float *partials;  // of the first query head
  float scale, masks[CELLS];
  int64_t cells[CELLS], count;
} Cells;

// Vector v of a row of keys or values.
INLINE vector load_state(const char *row, int64_t v, int is_q8) {
  if (!is_q8) return load_halves((const uint16_t *)row + v * LANES);
  const Q8Block *block = (const Q8Block *)row + v * LANES / 32;
  return all(widen_half(block->scale)) * load_codes(block->codes + v * LANES % 32);
}

// Adds the cells to the partial results of `heads` query heads.
INLINE void attend_cells(const Cells *at, int heads, int64_t width, int is_q8) {
  float scores[HEADS][CELLS];
  const int64_t count = at->count;
  for (int64_t c = 0; c < count; c += 4) {
    vector sums[HEADS][4];
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < 4; i++) sums[h][i] = all(0);
    for (int64_t v = 0; v < width / LANES; v++) {
      for (int i = 0; i < 4; i++) {
        const int64_t cell = at->cells[c + i < count ? c + i : count - 1];  // past the end, the last one again
        const vector part = load_state(at->keys + cell * at->key_stride, v, is_q8);
        for (int h = 0; h < heads; h++)
          sums[h][i] += part * load((const float *)(at->query + h * at->query_stride) + v * LANES);
      }
    }
    for (int h = 0; h < heads; h++) {
      sum_4(scores[h] + c, sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
      for (int64_t i = c; i < c + 4 && i < count; i++) scores[h][i] = scores[h][i] * at->scale + at->masks[i];
    }
  }
  for (int h = 0; h < heads; h++) {
    Partial *partial = partial_at(at->partials, h, width);
    float peak = partial->peak, total = 0;
    for (int64_t c = 0; c < count; c++) peak = scores[h][c] > peak ? scores[h][c] : peak;
    const float shrinks = partial->peak == peak ? 1 : exponential(partial->peak - peak);
    for (int64_t c = 0; c < count; c++) {
      scores[h][c] = exponential(scores[h][c] - peak);
      total += scores[h][c];
    }
    partial->peak = peak;
    partial->total = partial->total * shrinks + total;
    for (int64_t v = 0; v < width / LANES; v++)
      store(partial->values + v * LANES, load(partial->values + v * LANES) * all(shrinks));
  }
  for (int64_t v = 0; v < width / LANES; v++) {
    vector sums[HEADS];
    for (int h = 0; h < heads; h++) sums[h] = load(partial_at(at->partials, h, width)->values + v * LANES);
    for (int64_t c = 0; c < count; c++) {
      const vector part = load_state(at->values + at->cells[c] * at->value_stride, v, is_q8);
      for (int h = 0; h < heads; h++) sums[h] += all(scores[h][c]) * part;
    }
    for (int h = 0; h < heads; h++) store(partial_at(at->partials, h, width)->values + v * LANES, sums[h]);
  }
}

// The compiler makes a copy for each known number of heads and width.
INLINE void attend_heads(const Cells *at, int heads, int64_t width, int is_q8) {
  switch (heads) {
    case 1: attend_cells(at, 1, width, is_q8); break;
    case 2: attend_cells(at, 2, width, is_q8); break;
    case 3: attend_cells(at, 3, width, is_q8); break;
    default: attend_cells(at, 4, width, is_q8);
  }
}

static void attend_some(const Cells *at, int heads, int64_t width, int is_q8) {
  if (width == 64) is_q8 ? attend_heads(at, heads, 64, 1) : attend_heads(at, heads, 64, 0);
  else if (width == 128) is_q8 ? attend_heads(at, heads, 128, 1) : attend_heads(at, heads, 128, 0);
  else is_q8 ? attend_heads(at, heads, width, 1) : attend_heads(at, heads, width, 0);
}

// The part of one thread: cells `from` to `to` of all heads of a node FLASH_ATTN_EXT. `partials` is (heads, width + 2).
static void attend_part(const struct ggml_tensor *node, float *partials, float scale, int64_t from, int64_t to) {
  const struct ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
  const uint16_t *mask = node->src[3]->data;
  const int64_t width = q->ne[0], heads = q->ne[2], group = heads / k->ne[2];
  for (int64_t h = 0; h < heads; h++) {
    Partial *partial = partial_at(partials, h, width);
    partial->peak = -INFINITY, partial->total = 0;
    memset(partial->values, 0, width * sizeof(float));
  }
  Cells at = {.query_stride = q->nb[2], .key_stride = k->nb[1], .value_stride = v->nb[1], .scale = scale};
  for (int64_t cell = from; cell < to;) {
    for (at.count = 0; cell < to && at.count < CELLS; cell++) {
      if (mask[cell] == HIDDEN) continue;
      at.masks[at.count] = widen_half(mask[cell]);
      at.cells[at.count++] = cell;
    }
    for (int64_t h = 0; at.count && h < heads;) {
      const int64_t shared = h / group, left = (shared + 1) * group - h, some = left < HEADS ? left : HEADS;
      at.query = (const char *)q->data + h * q->nb[2];
      at.keys = (const char *)k->data + shared * k->nb[2];
      at.values = (const char *)v->data + shared * v->nb[2];
      at.partials = (float *)partial_at(partials, h, width);
      attend_some(&at, some, width, k->type == GGML_TYPE_Q8_0);
      h += some;
    }
  }
}

// Combines the partial results (parts, heads, width + 2) and writes them to the node.
static void combine(struct ggml_tensor *node, float *partials, int64_t parts) {
  const int64_t width = node->src[0]->ne[0], heads = node->src[0]->ne[2];
  for (int64_t h = 0; h < heads; h++) {
    float *y = (float *)((char *)node->data + h * node->nb[1]), peak = -INFINITY, total = 0;
    for (int64_t p = 0; p < parts; p++) peak = fmaxf(peak, partial_at(partials, p * heads + h, width)->peak);
    memset(y, 0, width * sizeof(float));
    for (int64_t p = 0; p < parts; p++) {
      const Partial *partial = partial_at(partials, p * heads + h, width);
      if (!partial->total) continue;
      const float weight = exponential(partial->peak - peak);
      total += weight * partial->total;
      for (int64_t i = 0; i < width; i++) y[i] += weight * partial->values[i];
    }
    for (int64_t i = 0; total && i < width; i++) y[i] /= total;
  }
}
