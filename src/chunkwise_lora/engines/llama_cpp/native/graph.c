// Runs adapters inside llama.cpp's own computation. llama.cpp offers every node of a graph to a callback before it computes
// them. A LoRA adapter that llama.cpp knows appears as mul_mat(lora_a, x), mul_mat(lora_b, .), scale and add. `observe`
// turns the first node into `shrink_rows` and the last into `expand_rows`, which run on llama.cpp's threads, and the
// others into nothing. A graph that llama.cpp uses again stays as it is.
#include <stdio.h>

#include "ggml.h"
#include "vectors.h"

#include "attention.h"
#include "products.h"

enum { DONE, OTHER_TOKENS, OTHER_PATTERN, OTHER_MODULE, OTHER_SHAPE, OTHER_ROWS, OTHER_ORDER };

// What ggml keeps in the op_params of a custom node; `same_layout` checks it.
typedef struct {
  ggml_custom_op_t function;
  int tasks;
  void *data;
} Custom;

// The factors of one adapter in one module. A module that the adapter does not have has rank 0 on every rung.
typedef struct {
  const void *down, *up;
  const float *scales;   // (rank,) factor of each direction, or null
  const int32_t *ranks;  // (rungs,) rank on each rung, ascending
  int64_t rank;
} Factors;

// What runs in one llama.cpp context. Python sets it; `graph` and below are set here.
typedef struct {
  const struct Module *modules;  // (module_count,) in the order of their names
  int64_t module_count, rungs, rank, element;
  float *z;         // (most rows of a graph, rank)
  float *partials;  // (threads, head_numbers): room for the attention of one token; null: llama.cpp's own attention
  int64_t threads, head_numbers;
  int64_t is_off;  // whether llama.cpp runs its own LoRA, in graphs that were not changed before
  // The tokens of the running llama_decode.
  const int32_t *tokens;    // (rows,)
  const int32_t *adapters;  // (rows,) place of the adapter among a module's factors, or -1
  const int32_t *tops;      // (rows,) highest rung with a weight
  const float *weights;     // (rows, rungs), or null: weight 1 for the highest rung
  int64_t rows;
  // The running graph. llama.cpp may cut the tokens into several graphs.
  const struct ggml_tensor *open;  // the last product with a lora_a that was seen
  int32_t *outputs;                // (most rows of a graph,), of which the last layer keeps `output_count`
  int64_t room, output_count, first_row, graph_rows;  // room: most rows of a graph
  // What happened in the running llama_decode.
  int64_t graphs, patterns, attentions;
  int32_t error, finished;  // finished: threads that have finished the running attention
  char where[GGML_MAX_NAME];
} Pass;

typedef struct Module {
  Pass *pass;
  const char *name;  // of the weight, such as blk.0.attn_q.weight
  int64_t in, out;
  const Factors *factors;  // (adapters,)
} Module;

static void fail(Pass *pass, int error, const char *where) {
  if (pass->error) return;
  pass->error = error;
  snprintf(pass->where, sizeof pass->where, "%s", where);
}

// The row of the pass that row `t` of a node with `count` rows is; -1 if that is not known.
INLINE int64_t row_of(const Pass *pass, int64_t count, int64_t t) {
  if (count == pass->graph_rows) return pass->first_row + t;
  if (count == pass->output_count) return pass->first_row + pass->outputs[t];
  return -1;
}

// The gate of direction j: the sum of the weights of the rungs whose rank is above j.
INLINE float gate_of(const Pass *pass, const Factors *factors, int64_t row, int64_t j) {
  float gate = 0;
  for (int64_t rung = pass->tops[row]; rung >= 0 && factors->ranks[rung] > j; rung--) gate += pass->weights[row * pass->rungs + rung];
  return gate;
}

// Up to BLOCK rows of a node that follow one another and have the same adapter.
typedef struct {
  const Factors *factors;  // null: no adapter
  int64_t rows, rank;      // rank: of the row that has most
} Block;

INLINE Block block_at(const Module *module, int64_t count, int64_t t, int64_t end) {
  const Pass *pass = module->pass;
  const int32_t adapter = pass->adapters[row_of(pass, count, t)];
  Block block = {adapter < 0 ? 0 : module->factors + adapter, 0, 0};
  for (; block.rows < BLOCK && t + block.rows < end; block.rows++) {
    const int64_t row = row_of(pass, count, t + block.rows);
    if (pass->adapters[row] != adapter) break;
    const int64_t rank = block.factors ? block.factors->ranks[pass->tops[row]] : 0;
    block.rank = rank > block.rank ? rank : block.rank;
  }
  return block;
}

// The part of `count` that thread `ith` of `nth` computes, in multiples of `step`.
typedef struct {
  int64_t from, to;
} Part;

INLINE Part part_of(int64_t count, int64_t step, int ith, int nth) {
  const int64_t each = (count + step * nth - 1) / (step * nth) * step, from = each * ith;
  return (Part){from < count ? from : count, from + each < count ? from + each : count};
}

INLINE int shares_rows(int64_t rows, int nth) { return rows >= BLOCK * nth; }

// Multiplies directions `part` of a row's z (rank,) by their gates, and by their scales if there are any.
INLINE void apply_gates(const Pass *pass, const Factors *factors, int64_t row, float *z, Part part) {
  const int64_t rank = factors ? factors->ranks[pass->tops[row]] : 0, end = rank < part.to ? rank : part.to;
  for (int64_t j = part.from; factors && factors->scales && j < end; j++) z[j] *= factors->scales[j];
  for (int64_t j = part.from; pass->weights && j < end; j++) z[j] *= gate_of(pass, factors, row, j);
  for (int64_t j = end > part.from ? end : part.from; j < part.to; j++) z[j] = 0;  // another row's directions
}

// z = g * (down x). Threads share the rows if there are many, otherwise the directions.
INLINE void shrink(const Module *module, const struct ggml_tensor *x, int ith, int nth, int element) {
  const Pass *pass = module->pass;
  const int64_t count = x->ne[1], stride = x->nb[1] / sizeof(float), in = module->in;
  const int by_rows = shares_rows(count, nth);
  const Part rows = by_rows ? part_of(count, BLOCK, ith, nth) : (Part){0, count};
  for (int64_t t = rows.from; t < rows.to;) {
    const Block block = block_at(module, count, t, rows.to);
    const Part part = by_rows ? (Part){0, block.rank} : part_of(block.rank, BLOCK, ith, nth);
    float *z = pass->z + t * pass->rank;
    const float *x_t = (const float *)x->data + t * stride;
    if (block.rows == BLOCK) {
      int64_t j = part.from;
      for (; j + 2 <= part.to; j += 2)
        project(z, pass->rank, x_t, stride, block.factors->down, in, j, BLOCK, 2, element);
      for (; j < part.to; j++) project(z, pass->rank, x_t, stride, block.factors->down, in, j, BLOCK, 1, element);
    } else {
      for (int64_t r = 0; r < block.rows; r++) {
        int64_t j = part.from;
        float *z_r = z + r * pass->rank;
        const float *x_r = x_t + r * stride;
        for (; j + BLOCK <= part.to; j += BLOCK)
          project(z_r, 0, x_r, 0, block.factors->down, in, j, 1, BLOCK, element);
        for (; j < part.to; j++) project(z_r, 0, x_r, 0, block.factors->down, in, j, 1, 1, element);
      }
    }
    for (int64_t r = 0; r < block.rows; r++)
      apply_gates(pass, block.factors, row_of(pass, count, t + r), z + r * pass->rank, part);
    t += block.rows;
  }
}

// y = base + up z. Threads share the rows if there are many, otherwise the outputs.
INLINE void grow(const Module *module, const struct ggml_tensor *node, int ith, int nth, int element) {
  static const int64_t sizes[] = {[FLOAT32] = 4, [FLOAT16] = 2, [INT8] = 1};
  const Pass *pass = module->pass;
  const struct ggml_tensor *base = node->src[0];
  const int64_t count = node->ne[1], out = module->out;
  const int64_t y_stride = node->nb[1] / sizeof(float), base_stride = base->nb[1] / sizeof(float);
  const int by_rows = shares_rows(count, nth);
  const Part rows = by_rows ? part_of(count, BLOCK, ith, nth) : (Part){0, count};
  const Part part = by_rows ? (Part){0, out} : part_of(out, TILE, ith, nth);
  for (int64_t t = rows.from; t < rows.to;) {
    const Block block = block_at(module, count, t, rows.to);
    float *y = (float *)node->data + t * y_stride;
    const float *from = (const float *)base->data + t * base_stride, *z = pass->z + t * pass->rank;
    for (int64_t r = 0; !block.rank && r < block.rows; r++)
      memmove(y + r * y_stride + part.from, from + r * base_stride + part.from, (part.to - part.from) * sizeof(float));
    for (int64_t o = part.from; block.rank && o < part.to; o += TILE) {
      const void *tile = (const char *)block.factors->up + o * block.factors->rank * sizes[element];
      const int64_t columns = out - o < TILE ? out - o : TILE;
      if (block.rows == BLOCK) {
        expand(y + o, y_stride, from + o, base_stride, z, pass->rank, tile, block.rank, columns, BLOCK, element);
      } else {
        for (int64_t r = 0; r < block.rows; r++)
          expand(y + r * y_stride + o, 0, from + r * base_stride + o, 0, z + r * pass->rank, 0, tile, block.rank, columns,
                 1, element);
      }
    }
    t += block.rows;
  }
}

static int knows_rows(const Module *module, int64_t count) {
  if (module->pass->error) return 0;
  if (!count || row_of(module->pass, count, 0) >= 0) return 1;
  fail(module->pass, OTHER_ROWS, module->name);
  return 0;
}

static void shrink_rows(struct ggml_tensor *node, int ith, int nth, void *data) {
  const Module *module = data;
  const struct ggml_tensor *x = node->src[1];
  if (!knows_rows(module, x->ne[1])) return;
  switch (module->pass->element) {
    case INT8: shrink(module, x, ith, nth, INT8); break;
    case FLOAT16: shrink(module, x, ith, nth, FLOAT16); break;
    default: shrink(module, x, ith, nth, FLOAT32);
  }
}

static void expand_rows(struct ggml_tensor *node, int ith, int nth, void *data) {
  const Module *module = data;
  if (!knows_rows(module, node->ne[1])) return;
  switch (module->pass->element) {
    case INT8: grow(module, node, ith, nth, INT8); break;
    case FLOAT16: grow(module, node, ith, nth, FLOAT16); break;
    default: grow(module, node, ith, nth, FLOAT32);
  }
}

static void attend(struct ggml_tensor *node, int ith, int nth, void *data) {
  Pass *pass = data;
  float scale;
  memcpy(&scale, node->op_params + sizeof(Custom) / sizeof *node->op_params, sizeof scale);
  const struct ggml_tensor *q = node->src[0];
  const int64_t parts = nth < pass->threads ? nth : pass->threads, cells = node->src[1]->ne[1];
  float *partials = pass->partials + ith * q->ne[2] * (q->ne[0] + 2);
  if (ith < parts) attend_part(node, partials, scale, cells * ith / parts, cells * (ith + 1) / parts);
  if (__atomic_add_fetch(&pass->finished, 1, __ATOMIC_ACQ_REL) < nth) return;
  pass->finished = 0;
  combine(node, pass->partials, parts);
}

static int ends_with(const char *name, const char *end) {
  const size_t length = strlen(name), tail = strlen(end);
  return length >= tail && !strcmp(name + length - tail, end);
}

// The module whose lora_a is called `name`, or null.
static const Module *module_of(const Pass *pass, const char *name) {
  const size_t length = strlen(name) - strlen(".lora_a");
  int64_t from = 0, to = pass->module_count;
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    const Module *module = pass->modules + middle;
    int order = strncmp(name, module->name, length);
    if (!order && module->name[length]) order = -1;
    if (!order) return module;
    if (order < 0) to = middle;
    else from = middle + 1;
  }
  return 0;
}

static int is_plain(const struct ggml_tensor *t, int64_t columns) {
  return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[0] == columns && t->ne[2] == 1 && t->ne[3] == 1;
}

static void become(struct ggml_tensor *node, ggml_custom_op_t function, const void *data) {
  const Custom custom = {function, -1, (void *)data};  // -1: all threads
  memset(node->op_params, 0, sizeof node->op_params);
  memcpy(node->op_params, &custom, sizeof custom);
  node->op = GGML_OP_CUSTOM;
}

static ggml_custom_op_t function_of(const struct ggml_tensor *node) {
  Custom custom;
  memcpy(&custom, node->op_params, sizeof custom);
  return custom.function;
}

// Takes over the adapter that ends in `add`, whose second source is `scale`.
static void take_over(Pass *pass, struct ggml_tensor *add, struct ggml_tensor *scale) {
  struct ggml_tensor *up = scale->src[0], *down = up->src[1];
  if (down->op != GGML_OP_MUL_MAT || !ends_with(down->src[0]->name, ".lora_a")) {
    fail(pass, OTHER_PATTERN, up->src[0]->name);
    return;
  }
  const Module *module = module_of(pass, down->src[0]->name);
  if (!module) {
    fail(pass, OTHER_MODULE, down->src[0]->name);
  } else if (down != pass->open) {  // the results of two modules would be in z at once
    fail(pass, OTHER_ORDER, module->name);
  } else if (!is_plain(down->src[1], module->in) || !is_plain(add, module->out) || !is_plain(add->src[0], module->out)) {
    fail(pass, OTHER_SHAPE, module->name);
  } else {
    become(down, shrink_rows, module);
    up->op = scale->op = GGML_OP_NONE;
    become(add, expand_rows, module);
    pass->patterns++;
  }
}

// Whether `attend` can compute this node: one token, keys and values of one type, and nothing but a mask.
static int can_attend(const Pass *pass, const struct ggml_tensor *node) {
  const struct ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  float params[3];  // scale, slope of ALiBi, cap
  memcpy(params, node->op_params, sizeof params);
  const int is_q8 = k->type == GGML_TYPE_Q8_0;
  return pass->partials && q->ne[1] == 1 && q->ne[3] == 1 && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) &&
         (is_q8 || k->type == GGML_TYPE_F16) && k->type == v->type && k->ne[3] == 1 && v->ne[0] == q->ne[0] &&
         k->nb[0] == v->nb[0] && k->nb[0] == (is_q8 ? sizeof(Q8Block) : sizeof(uint16_t)) && k->ne[2] == v->ne[2] &&
         q->ne[0] % (is_q8 ? 32 : LANES) == 0 && q->ne[2] % k->ne[2] == 0 &&
         q->ne[2] * (q->ne[0] + 2) <= pass->head_numbers && mask && mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 &&
         !node->src[4] && params[1] == 0 && params[2] == 0 && node->type == GGML_TYPE_F32;
}

static void take_attention(Pass *pass, struct ggml_tensor *node) {
  float scale;
  memcpy(&scale, node->op_params, sizeof scale);
  become(node, attend, pass);
  memcpy(node->op_params + sizeof(Custom) / sizeof *node->op_params, &scale, sizeof scale);
  pass->attentions++;
}

static void begin_graph(Pass *pass, const struct ggml_tensor *tokens) {
  pass->first_row += pass->graph_rows;
  pass->graph_rows = tokens->ne[0];
  pass->output_count = 0;
  pass->open = 0;
  pass->graphs++;
  if (pass->graph_rows > pass->room || pass->first_row + pass->graph_rows > pass->rows ||
      memcmp(tokens->data, pass->tokens + pass->first_row, pass->graph_rows * sizeof(int32_t)))
    fail(pass, OTHER_TOKENS, tokens->name);
}

// Copies the rows that the last layer keeps: ggml uses their memory again before that layer ends.
static void see_outputs(Pass *pass, const struct ggml_tensor *rows) {
  pass->output_count = rows->ne[0] <= pass->graph_rows ? rows->ne[0] : 0;
  memcpy(pass->outputs, rows->data, pass->output_count * sizeof(int32_t));
  for (int64_t i = 0; i < pass->output_count; i++)
    if (pass->outputs[i] < 0 || pass->outputs[i] >= pass->graph_rows) fail(pass, OTHER_ROWS, rows->name);
}

static void see_rows(Pass *pass, const struct ggml_tensor *table, const struct ggml_tensor *rows) {
  if (ends_with(table->name, ".lora_a")) {
    fail(pass, OTHER_PATTERN, table->name);
  } else if (!strcmp(rows->name, "inp_tokens")) {
    begin_graph(pass, rows);
  } else if (!strcmp(rows->name, "out_ids")) {
    see_outputs(pass, rows);
  }
}

// llama.cpp's callback: called for every node of a graph, in order, before the first one is computed.
bool observe(struct ggml_tensor *node, bool asks, void *data) {
  Pass *pass = data;
  if (!asks || pass->is_off || pass->error) return false;
  switch (node->op) {
    case GGML_OP_GET_ROWS: see_rows(pass, node->src[0], node->src[1]); break;
    case GGML_OP_MUL_MAT:
      if (ends_with(node->src[0]->name, ".lora_a")) pass->open = node;
      break;
    case GGML_OP_MUL_MAT_ID:
      if (ends_with(node->src[0]->name, ".lora_a")) fail(pass, OTHER_PATTERN, node->src[0]->name);
      break;
    case GGML_OP_ADD: {
      struct ggml_tensor *scale = node->src[1];
      if (scale->op == GGML_OP_SCALE && scale->src[0]->op == GGML_OP_MUL_MAT &&
          ends_with(scale->src[0]->src[0]->name, ".lora_b"))
        take_over(pass, node, scale);
      break;
    }
    case GGML_OP_CUSTOM:
      if (function_of(node) == expand_rows) pass->patterns++;
      if (function_of(node) == attend) pass->attentions++;
      break;
    case GGML_OP_FLASH_ATTN_EXT:
      if (can_attend(pass, node)) take_attention(pass, node);
      break;
    default: break;
  }
  return false;
}

// Whether a custom node that ggml itself has made, called "node" and with `data`, is laid out as this file expects.
int same_layout(const struct ggml_tensor *node, const struct ggml_tensor *source, size_t size, const void *data) {
  Custom custom;
  memcpy(&custom, node->op_params, sizeof custom);
  return size == sizeof *node && node->op == GGML_OP_CUSTOM && node->type == GGML_TYPE_F32 && node->ne[0] == 3 &&
         node->ne[1] == 2 && node->nb[1] == 3 * sizeof(float) && node->src[0] == source && custom.tasks == -1 &&
         custom.data == data && !strcmp(node->name, "node");
}

// The entropy in nats of softmax(logits (count,)).
float entropy(const float *logits, int64_t count) {
  float peak = -INFINITY;
  double total = 0, moment = 0;
  for (int64_t i = 0; i < count; i++) peak = logits[i] > peak ? logits[i] : peak;
  for (int64_t from = 0; from < count; from += 1024) {
    const int64_t to = from + 1024 < count ? from + 1024 : count;
    float sums = 0, moments = 0;
#pragma omp simd reduction(+ : sums, moments)
    for (int64_t i = from; i < to; i++) {
      const float below = logits[i] - peak, p = exponential(below);
      sums += p;
      moments += below > -87.0f ? p * below : 0;
    }
    total += sums, moment += moments;
  }
  return (float)(log(total) - moment / total);
}
