// The adapter product y = base + up (g * (down x)) for rows of float32, with factors in float32, float16 or int8.
//
// Factors lie as they are read. `down` is (rank, in). `up` is in tiles of TILE outputs, (tiles, rank, TILE), the last one
// filled with zeros, so that the first k directions of a tile are contiguous.
enum { FLOAT32, FLOAT16, INT8 };  // element types
enum { TILE = 32, BLOCK = 4 };    // outputs of a tile; rows and directions that are computed together

INLINE vector widen(const void *from, int64_t i, int element) {
  return element == INT8      ? load_codes((const int8_t *)from + i)
         : element == FLOAT16 ? load_halves((const uint16_t *)from + i)
                              : load((const float *)from + i);
}

INLINE float widen_one(const void *from, int64_t i, int element) {
  return element == INT8      ? ((const int8_t *)from)[i]
         : element == FLOAT16 ? widen_half(((const uint16_t *)from)[i])
                              : ((const float *)from)[i];
}

// z[r * z_stride + j] = <down_j, x_r> for `directions` from `first` on and `rows` rows; both counts are known when this is
// compiled. Two sums per result where there are few, so that they do not wait for each other.
INLINE void project(float *z, int64_t z_stride, const float *x, int64_t x_stride, const void *down, int64_t in,
                    int64_t first, int rows, int directions, int element) {
  const int chains = rows * directions > BLOCK ? 1 : 2;
  vector sums[BLOCK * BLOCK];
  int64_t i = 0;
  for (int s = 0; s < rows * directions * chains; s++) sums[s] = all(0);
  for (; i + chains * LANES <= in; i += chains * LANES) {
    for (int c = 0; c < chains; c++) {
      vector x_i[BLOCK];
      for (int r = 0; r < rows; r++) x_i[r] = load(x + r * x_stride + i + c * LANES);
      for (int j = 0; j < directions; j++) {
        const vector d = widen(down, (first + j) * in + i + c * LANES, element);
        for (int r = 0; r < rows; r++) sums[(j * rows + r) * chains + c] += d * x_i[r];
      }
    }
  }
  float totals[BLOCK * BLOCK];
  const int count = rows * directions;
  for (int s = 0; chains == 2 && s < count; s++) sums[s] = sums[2 * s] + sums[2 * s + 1];
  for (int s = 0; s + 4 <= count; s += 4) sum_4(totals + s, sums[s], sums[s + 1], sums[s + 2], sums[s + 3]);
  for (int s = count / 4 * 4; s < count; s++) totals[s] = sum(sums[s]);
  for (int j = 0; j < directions; j++) {
    for (int r = 0; r < rows; r++) {
      float rest = 0;
      for (int64_t k = i; k < in; k++) rest += widen_one(down, (first + j) * in + k, element) * x[r * x_stride + k];
      z[r * z_stride + first + j] = totals[j * rows + r] + rest;
    }
  }
}

// y_r = base_r + sum over k directions of z_r[j] up_j, for one tile of `columns` outputs.
INLINE void expand(float *y, int64_t y_stride, const float *base, int64_t base_stride, const float *z, int64_t z_stride,
                   const void *tile, int64_t k, int64_t columns, int rows, int element) {
  enum { PART = 2 * LANES < TILE ? 2 * LANES : TILE, VECTORS = PART / LANES };
  float ends[2][BLOCK][TILE] = {{{0}}};
  const int whole = columns == TILE;
  for (int r = 0; !whole && r < rows; r++) memcpy(ends[0][r], base + r * base_stride, columns * sizeof(float));
  for (int part = 0; part < TILE; part += PART) {
    vector sums[BLOCK][VECTORS], others[BLOCK][VECTORS];
    for (int r = 0; r < rows; r++) {
      const float *from = whole ? base + r * base_stride : ends[0][r];
      for (int v = 0; v < VECTORS; v++) sums[r][v] = load(from + part + v * LANES), others[r][v] = all(0);
    }
    int64_t j = 0;
    for (; rows == 1 && j + 2 <= k; j += 2) {
      for (int v = 0; v < VECTORS; v++) {
        sums[0][v] += all(z[j]) * widen(tile, j * TILE + part + v * LANES, element);
        others[0][v] += all(z[j + 1]) * widen(tile, (j + 1) * TILE + part + v * LANES, element);
      }
    }
    for (; j < k; j++) {
      for (int v = 0; v < VECTORS; v++) {
        const vector u = widen(tile, j * TILE + part + v * LANES, element);
        for (int r = 0; r < rows; r++) sums[r][v] += all(z[r * z_stride + j]) * u;
      }
    }
    for (int r = 0; r < rows; r++) {
      float *to = whole ? y + r * y_stride : ends[1][r];
      for (int v = 0; v < VECTORS; v++) store(to + part + v * LANES, sums[r][v] + others[r][v]);
    }
  }
  for (int r = 0; !whole && r < rows; r++) memcpy(y + r * y_stride, ends[1][r], columns * sizeof(float));
}
