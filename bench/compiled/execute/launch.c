// A launch: programs one after the other, their warps in turn from barrier to barrier.
#include "values.h"
#include "warp.h"
#include "memory.h"
#include "matrix.h"

typedef void (*Operation)(Warp *, const Instruction *, uint32_t);
static void nothing(Warp *W, const Instruction *I, uint32_t m) { }
static void trap(Warp *W, const Instruction *I, uint32_t m) { report(TRAPPED, m); }
#include "operations.h"   // generated: one function an operation, and their table
enum { BRANCH, BARRIER, RETURN, FIRST_OF_TABLE };
// As a target: not wgmma itself, and has a register of one; the same, and is a mov.
enum { ON_WGMMA_REGISTERS = -3, MOVES_ON_WGMMA = -4 };
enum { SPECIAL = 16 };   // as a width: a value that depends on the lane, the warp or the program
enum { AT_BARRIER = 1, AT_END = 2 };

typedef struct {
  const Instruction *code;
  int64_t n, most, executed, left;   // instructions: of the code, allowed a program, so far, yet
  uint8_t *reached;                  // an instruction: REACHED, MASKED
} Run;

// LLVM copies accumulators behind the fence too. ptxas (12.8 and 12.9) renames such a mov away, gives
// a product of zeros no accumulator (RZ, !UPT), or adds a fence (C7519): a mov is no use, and what it
// copies is as old as where it comes from.
static void use_wgmma_registers(Warp *W, const Instruction *I) {
  for (int k = 0; k < I->count; k++) {
    if (W->busy[SLOT(k)]) report(WGMMA_REGISTER, k);
    if (I->target != MOVES_ON_WGMMA) W->traces[SLOT(k)].fences = W->wgmma_fences;
  }
  if (I->target == MOVES_ON_WGMMA) W->traces[SLOT(0)].fences = W->traces[SLOT(1)].fences;
}

// Lanes that stand at the least place go on together ("Independent thread scheduling" allows any
// order; this one brings them together again as early as a compiler expects).
static int advance(Warp *W, Run *run, int *barrier) {
  for (;;) {
    int pc = INT32_MAX;
    uint32_t active = 0;
    for (int l = 0; l < 32; l++) {
      if (!(W->alive >> l & 1) || W->pc[l] > pc) continue;
      if (W->pc[l] < pc) active = 0;
      pc = W->pc[l];
      active |= 1u << l;
    }
    if (!active) return AT_END;
    int together = active == W->alive;
    for (;;) {
      if (pc >= run->n || run->left-- <= 0) {
        report(NO_END, pc);
        return AT_END;
      }
      const Instruction *I = run->code + pc;
      uint32_t m = active;
      run->executed++;
      line_now = I->line;
      if (I->guard >= 0) {
        uint32_t bits = W->values[32 * (size_t)I->guard];
        uint32_t unset = active & ~W->traces[I->guard].set;
        if (unset) report(UNSET_CONDITION, unset);
        m &= I->negate ? ~bits : bits;
      }
      run->reached[pc] |= m == active ? REACHED : REACHED | MASKED;
      if (I->op >= FIRST_OF_TABLE) {
        if (m) {
          if (I->target <= ON_WGMMA_REGISTERS) use_wgmma_registers(W, I);
          operations[I->op - FIRST_OF_TABLE](W, I, m);
        }
        pc++;
        if (together) continue;
        for (int l = 0; l < 32; l++) if (active >> l & 1) W->pc[l] = pc;
        break;
      }
      if (I->op == BRANCH) {
        if (together && m == active) {
          pc = I->target;
          continue;
        }
        if (together && !m) {
          pc++;
          continue;
        }
        for (int l = 0; l < 32; l++)
          if (active >> l & 1) W->pc[l] = m >> l & 1 ? I->target : pc + 1;
        break;
      }
      for (int l = 0; l < 32; l++) if (active >> l & 1) W->pc[l] = pc + 1;
      if (I->op == BARRIER) {   // .aligned: all lanes of a warp execute it ("bar")
        if (!together || m != active) report(BARRIER_DIVERGED, active);
        *barrier = pc;
        return AT_BARRIER;
      }
      W->alive &= ~m;
      break;
    }
  }
}

// initial: [n, 3]: slot, width, value; the value of a special register is its number.
static void start_warp(Warp *W, int slots, const int64_t *initial, int n_initial,
                       const int *place) {
  memset(W->traces, 0, slots * sizeof *W->traces);
  memset(W->busy, 0, slots);
  for (int i = 0; i < n_initial; i++) {
    int64_t slot = initial[3 * i], width = initial[3 * i + 1], value = initial[3 * i + 2];
    uint32_t *words = W->values + 32 * slot;
    for (int l = 0; l < 32; l++) {
      int special[12] = {32 * W->id + l, 0, 0, place[0], place[1], place[2], place[3], place[4],
                         place[5], place[6], l, W->id};   // the order of SPECIAL in program.py
      int64_t x = width == SPECIAL ? special[value] : value;
      if (width == 8) memcpy(words + 2 * l, &x, 8);
      else if (width == 0) words[0] = x ? ~0u : 0;
      else words[l] = (uint32_t)x;
    }
    W->traces[slot].set = ~0u;
  }
  memset(W->pc, 0, sizeof W->pc);
  W->alive = ~0u;
  W->finished = W->commits = W->n_copies = W->wgmma_commits = W->n_products = 0;
  W->wgmma_fences = W->fence = W->fence_before = 0;
}

static void run_program(Run *run, Warp *warps, int n) {
  run->left = run->most;
  for (;;) {
    int stopped = 0, at = -1, barrier = 0;
    for (int k = 0; k < n && n_violations < LIMIT; k++) {
      Warp *W = warps + (epoch & 1 ? k : n - 1 - k);   // in turns, from either end
      if (W->finished) continue;
      warp_now = W->id;
      if (advance(W, run, &barrier) == AT_END) {
        W->finished = 1;
        continue;
      }
      if (at >= 0 && at != barrier) report(BARRIER_DIVERGED, at);
      at = barrier;
      stopped++;
    }
    for (int k = 0; k < n; k++)
      if (stopped && warps[k].finished) report(BARRIER_DIVERGED, k);
    next_epoch();
    for (int k = 0; k < n; k++) {
      warps[k].fence_before = warps[k].fence;
      if (warps[k].fence > fences_passed_on) fences_passed_on = warps[k].fence;
    }
    if (!stopped || n_violations == LIMIT) return;
  }
}

int run_launch(
    const Instruction *code, int64_t n_code, const int32_t *pool, int slots, int shared_grain,
    int products, const int64_t *initial, int n_initial, const int32_t *grid, int threads,
    int shared_bytes,
    Range *tensors, int n_tensors, int64_t most, int64_t *found, int64_t *executed,
    uint8_t *reached) {
  int n = threads / 32;
  uint32_t grains = ((uint32_t)shared_bytes + 15) >> shared_grain;
  Run run = {code, n_code, most, 0, 0, reached};
  first_instruction = code;
  reached_flags = reached;
  Warp *warps = calloc(n, sizeof *warps);
  all_warps = warps;
  operands = pool;
  violations = found;
  n_violations = 0;
  ranges = tensors;
  n_ranges = n_tensors;
  grain = shared_grain;
  has_products = products;
  shared_size = shared_bytes;
  shared = malloc(shared_bytes + 16);
  writer = calloc(grains + 1, sizeof *writer);
  reader = calloc(grains + 1, sizeof *reader);
  state = calloc(grains + 1, 1);
  stored = calloc(grains + 1, sizeof *stored);
  stored_by = calloc(grains + 1, 1);
  pending = calloc(shared_bytes / 16 + 2, sizeof *pending);
  barrier_after = calloc(1 << 16, sizeof *barrier_after);
  epoch = clock_now = 1;
  fences_passed_on = 0;
  for (int k = 0; k < n_tensors; k++) {
    size_t items = (tensors[k].high - tensors[k].low) / tensors[k].item + 1;
    tensors[k].written = calloc(items, sizeof(Access));
    tensors[k].read = calloc(items, sizeof(Access));
  }
  for (int k = 0; k < n; k++) {
    Warp *W = warps + k;
    W->id = k;
    W->values = malloc((size_t)slots * 128);
    W->traces = malloc(slots * sizeof *W->traces);
    W->busy = malloc(slots);
    W->products = calloc(products ? MOST_PRODUCTS : 0, sizeof *W->products);
    for (int i = 0; products && i < MOST_PRODUCTS; i++) W->products[i].chunks = malloc(1024 * 4);
    memset(W->values, 0xff, (size_t)slots * 128);
  }
  program = 0;
  for (int i = 0; i < grid[0] * grid[1] * grid[2]; i++) {
    int x = i % grid[0], y = i / grid[0] % grid[1], z = i / grid[0] / grid[1];
    int place[7] = {x, y, z, grid[0], grid[1], grid[2], threads};
    program++;
    next_epoch();
    clear_shared(shared_bytes);
    for (int k = 0; k < n; k++) start_warp(warps + k, slots, initial, n_initial, place);
    fences_passed_on = 0;
    run_program(&run, warps, n);
  }
  for (int k = 0; k < n; k++) {
    Warp *W = warps + k;
    for (int i = 0; products && i < MOST_PRODUCTS; i++) free(W->products[i].chunks);
    free(W->values), free(W->traces), free(W->busy), free(W->products), free(W->copies);
  }
  for (int k = 0; k < n_tensors; k++) free(tensors[k].written), free(tensors[k].read);
  free(warps), free(shared), free(writer), free(reader), free(state), free(stored), free(stored_by);
  free(pending), free(barrier_after);
  *executed = run.executed;
  return n_violations;
}
