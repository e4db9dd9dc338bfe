// Compares the vector loads and the products of the kernels with plain C. Prints what differs, and returns 1.
#include <stdio.h>
#include <stdlib.h>

#include "vectors.h"

#include "products.h"

enum { IN = 83, OUT = 45, RANK = 11, ROWS = 4, TILES = (OUT + TILE - 1) / TILE };

static int differs(const char *what, float found, float expected) {
  if (fabsf(found - expected) <= 1e-4f * (1 + fabsf(expected))) return 0;
  printf("%s: %g, not %g\n", what, found, expected);
  return 1;
}

static float random_number(void) { return (float)rand() / RAND_MAX * 2 - 1; }

static int check_halves(void) {
  int bad = 0;
  for (uint32_t first = 0; first < 0x7c00; first += LANES) {
    uint16_t halves[LANES];
    float found[LANES];
    for (int i = 0; i < LANES; i++) halves[i] = (first + i) ^ (first & 16 ? 0x8000 : 0);
    store(found, load_halves(halves));
    for (int i = 0; i < LANES; i++) bad |= differs("a half", found[i], widen_half(halves[i]));
  }
  return bad;
}

static int check_products(int element) {
  static float x[ROWS][IN], wide_down[RANK][IN], wide_up[RANK][TILES * TILE], base[ROWS][OUT], z[ROWS][RANK], y[ROWS][OUT];
  static char down[RANK * IN * 4], up[RANK * TILES * TILE * 4];
  int bad = 0;
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < IN; i++) x[r][i] = random_number();
  for (int r = 0; r < ROWS; r++)
    for (int o = 0; o < OUT; o++) base[r][o] = random_number();
  for (int i = 0; i < RANK * IN; i++) {
    if (element == INT8) ((int8_t *)down)[i] = rand() % 255 - 127;
    else if (element == FLOAT16) ((uint16_t *)down)[i] = 0x3000 + rand() % 0xc00;
    else ((float *)down)[i] = random_number();
    wide_down[i / IN][i % IN] = widen_one(down, i, element);
  }
  for (int i = 0; i < RANK * TILES * TILE; i++) {
    const int tile = i / (RANK * TILE), j = i / TILE % RANK, o = tile * TILE + i % TILE;
    if (element == INT8) ((int8_t *)up)[i] = rand() % 255 - 127;
    else if (element == FLOAT16) ((uint16_t *)up)[i] = 0xb000 + rand() % 0xc00;
    else ((float *)up)[i] = random_number();
    wide_up[j][o] = widen_one(up, i, element);
  }
  const int64_t sizes[] = {4, 2, 1}, tile_bytes = RANK * TILE * sizes[element];
  for (int together = 1; together <= ROWS; together += ROWS - 1) {  // rows one by one, then all at once
    for (int r = 0; r < ROWS; r += together) {
      int j = 0;
      for (; j + 2 <= RANK; j += 2) {
        if (together == 1) project(z[r], RANK, x[r], IN, down, IN, j, 1, 2, element);
        else project(z[r], RANK, x[r], IN, down, IN, j, ROWS, 2, element);
      }
      if (together == 1) project(z[r], RANK, x[r], IN, down, IN, j, 1, 1, element);
      else project(z[r], RANK, x[r], IN, down, IN, j, ROWS, 1, element);
      for (int t = 0; t < TILES; t++) {
        const int o = t * TILE, columns = OUT - o < TILE ? OUT - o : TILE;
        if (together == 1) expand(y[r] + o, OUT, base[r] + o, OUT, z[r], RANK, up + t * tile_bytes, RANK, columns, 1, element);
        else expand(y[r] + o, OUT, base[r] + o, OUT, z[r], RANK, up + t * tile_bytes, RANK, columns, ROWS, element);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int j = 0; j < RANK; j++) {
        double sum = 0;
        for (int i = 0; i < IN; i++) sum += (double)wide_down[j][i] * x[r][i];
        bad |= differs("z", z[r][j], (float)sum);
      }
      for (int o = 0; o < OUT; o++) {
        double sum = base[r][o];
        for (int j = 0; j < RANK; j++) sum += (double)z[r][j] * wide_up[j][o];
        bad |= differs("y", y[r][o], (float)sum);
      }
    }
  }
  return bad;
}

int main(void) {
  const int bad = check_halves() | check_products(FLOAT32) | check_products(FLOAT16) | check_products(INT8);
  if (!bad) printf("%d lanes are right\n", LANES);
  return bad;
}
