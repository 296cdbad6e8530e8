// Global and shared memory: bounds, alignment, races, copies under way, what was never written.
//
// A race is two accesses of one place, one of them a write, by two threads with no barrier in
// between ("Memory Consistency Model": without one they are not ordered, in one warp neither).
// Writing what is there already is let pass: it makes no difference who is first.

typedef struct { uint32_t program, who; } Access;   // who: epoch << 16 | thread
typedef struct {
  uint64_t low, high;       // a tensor's bytes
  int64_t pitch, length;    // bytes from row to row and of a row, where rows do not touch, else 0
  int64_t item;
  Access *written, *read;   // an element each, made by run_launch
} Range;

static Range *ranges;
static int n_ranges;
static uint32_t program;    // 1 + number of the program under way
static uint32_t epoch;      // barriers passed, and programs
static int warp_now;

static uint8_t *shared;
static uint32_t shared_size;
static int grain;           // log2 of the bytes that are traced together: the smallest access
static uint32_t *writer, *reader;   // who, a grain
static uint8_t *state;              // a grain: WRITTEN, COPYING
static uint32_t *stored;            // a grain: clock of its last ordinary store, 0: none
static uint8_t *stored_by;          //          and its warp
static uint16_t *pending;           // a chunk of 16 bytes: products under way that read it
static uint32_t clock_now, last_barrier;   // fences and barriers, counted together
static int has_products;
enum { WRITTEN = 1, COPYING = 2 };
#define BY_COPY 0x80000000u   // beside the clock in `stored`: cp.async stored it

// Who: a thread + 1; all lanes of a warp that have met since; lanes of one warp; lanes of several.
enum { MET = 2048, LANES_OF = 4096, MANY = 0xffff };
static inline uint32_t thread_of(int warp, int lane) { return 32 * warp + lane + 1; }
static inline int warp_of(uint32_t who) {
  if (who == MANY) return -1;
  if (who >= LANES_OF) return (int)who - LANES_OF;
  return who >= MET ? (int)who - MET : ((int)who - 1) / 32;
}
// May `me` go on without a barrier where `other` was? A warp's lanes may that have met.
static inline int ordered(uint32_t other, uint32_t me) {
  return other == me || (other == MET + (uint32_t)warp_of(me) && warp_of(me) >= 0);
}
static inline uint32_t joined(uint32_t before, uint32_t me) {
  if (before == me) return me;
  int warp = warp_of(before);
  return warp >= 0 && warp == warp_of(me) ? LANES_OF + (uint32_t)warp : MANY;
}

// ---- global memory

static Range *range_of(uint64_t address, int size) {
  static int last;
  for (int i = 0; i < n_ranges; i++) {
    Range *range = ranges + (last + i) % n_ranges;
    if (address < range->low || address + size > range->high) continue;
    int64_t into = address - range->low;
    if (range->pitch && into % range->pitch + size > range->length) continue;
    last = (last + i) % n_ranges;
    return range;
  }
  return 0;
}
// Did another thread of this program get there since the last barrier?
static inline int raced(const Access *other, uint32_t thread) {
  if (other->program != program || other->who >> 16 != epoch) return 0;
  return !ordered(other->who & 0xffff, thread);
}
static inline int by_another(const Access *other) {
  return other->program && other->program != program;
}
static inline int64_t item_at(const Range *range, uint64_t address) {
  return (int64_t)(address - range->low) / range->item;
}
static void trace_read(Range *range, uint64_t address, int size, uint32_t thread) {
  uint32_t me = epoch << 16 | thread;
  int64_t last = item_at(range, address + size - 1);
  for (int64_t i = item_at(range, address); i <= last; i++) {
    Access *w = range->written + i, *r = range->read + i;
    if (by_another(w)) report(PROGRAMS_RACE, address);
    if (raced(w, thread)) report(READ_AFTER_WRITE, address);
    if (!r->program) *r = (Access){program, me};
    else if (r->program != program) r->program = ~0u;   // several programs
    else r->who = r->who >> 16 == epoch ? epoch << 16 | joined(r->who & 0xffff, thread) : me;
  }
}
// The same bits, or NaN both: a GPU has one NaN, this processor's differ in their signs.
static int same_value(const uint8_t *a, const uint8_t *b, int size, int64_t item) {
  if (!memcmp(a, b, size)) return 1;
  if ((item != 4 && item != 8) || size < item) return 0;
  for (int at = 0; at < size; at += item) {
    if (!memcmp(a + at, b + at, item)) continue;
    double x = item == 8 ? *(const double *)(a + at) : *(const float *)(a + at);
    double y = item == 8 ? *(const double *)(b + at) : *(const float *)(b + at);
    if (x == x || y == y) return 0;
  }
  return 1;
}
static void trace_write(Range *range, uint64_t address, int size, uint32_t thread,
                        const void *value) {
  uint32_t me = epoch << 16 | thread;
  int same = same_value((const uint8_t *)address, value, size, range->item);
  int64_t last = item_at(range, address + size - 1);
  for (int64_t i = item_at(range, address); i <= last; i++) {
    Access *w = range->written + i, *r = range->read + i;
    if (!(same && w->program)) {
      if (by_another(w) || by_another(r)) report(PROGRAMS_RACE, address);
      if (raced(w, thread)) report(WRITE_AFTER_WRITE, address);
      if (raced(r, thread)) report(WRITE_AFTER_READ, address);
    }
    *w = (Access){program, me};
  }
}
static void load_global(Warp *W, const Instruction *I, uint32_t m) {   // registers, address
  int n = I->vector, bytes = n * I->size;
  uint32_t bad = m & ~SET(n);
  uint64_t from[32];
  if (bad) report(UNSET_ADDRESS, bad);
  EACH from[l] = V64(n)[l] + I->offset;
  EACH {
    uint8_t value[16];
    Range *range = range_of(from[l], bytes);
    if (from[l] % bytes) report(MISALIGNED, from[l]);
    if (!range) {
      report(READ_OUTSIDE, from[l]);
      memset(value, 0xff, 16);
    } else {
      trace_read(range, from[l], bytes, thread_of(W->id, l));
      memcpy(value, (void *)from[l], bytes);
    }
    for (int i = 0; i < n; i++) {
      uint64_t x = 0;
      memcpy(&x, value + i * I->size, I->size);
      if (I->width == 8) V64(i)[l] = x;
      else V32(i)[l] = (uint32_t)x;
    }
  }
  for (int i = 0; i < n; i++) mark(W, I, i, m, ~0u);
}
static void store_global(Warp *W, const Instruction *I, uint32_t m) {   // registers, address
  int n = I->vector, bytes = n * I->size;
  uint32_t bad = m & ~SET(n);
  if (bad) report(UNSET_ADDRESS, bad);
  for (int i = 0; i < n; i++) if (m & ~SET(i)) report(UNSET_STORED, m & ~SET(i));
  EACH {
    uint8_t value[16];
    uint64_t to = V64(n)[l] + I->offset;
    Range *range = range_of(to, bytes);
    for (int i = 0; i < n; i++) {
      uint64_t x = lane_bits(W, I, i, l);
      memcpy(value + i * I->size, &x, I->size);
    }
    if (to % bytes) report(MISALIGNED, to);
    if (!range) {
      report(WRITE_OUTSIDE, to);
      continue;
    }
    trace_write(range, to, bytes, thread_of(W->id, l), value);
    memcpy((void *)to, value, bytes);
  }
}

// ---- shared memory

static int in_shared(uint32_t at, int size) {
  if (at % size) {
    report(MISALIGNED, at);
    if (size == 16) return 0;
  }
  if ((uint64_t)at + size <= shared_size) return 1;
  report(SHARED_OUTSIDE, at);
  return 0;
}
static inline int others(uint32_t trace, uint32_t who) {   // since the last barrier
  return trace >> 16 == epoch && !ordered(trace & 0xffff, who);
}
// Is all of it set?
static int read_shared(uint32_t at, int size, uint32_t who) {
  int all = WRITTEN;
  for (uint32_t i = at >> grain, n = (at + size - 1) >> grain; i <= n; i++) {
    uint32_t w = writer[i], r = reader[i];
    if (others(w, who)) report(READ_AFTER_WRITE, (int64_t)i << grain);
    reader[i] = epoch << 16 | (r >> 16 == epoch ? joined(r & 0xffff, who) : who);
    if (state[i] & COPYING) report(COPY_UNFINISHED, (int64_t)i << grain);
    all &= state[i];
  }
  return all;
}
static void write_shared(uint32_t at, int size, uint32_t who, const uint8_t *value,
                         int is_set) {   // no value: a copy starts
  int alike = value && same_value(shared + at, value, size, 4);
  for (uint32_t i = at >> grain, n = (at + size - 1) >> grain; i <= n; i++) {
    uint32_t w = writer[i], r = reader[i];
    if (state[i] & COPYING) report(COPY_UNFINISHED, (int64_t)i << grain);
    if (has_products && pending[(i << grain) >> 4]) report(WGMMA_READS, (int64_t)i << grain);
    int same = value && w >> 16 == epoch &&
               (alike || !memcmp(shared + (i << grain), value + ((i << grain) - at), 1u << grain));
    if (!same && others(w, who)) report(WRITE_AFTER_WRITE, (int64_t)i << grain);
    if (!same && others(r, who)) report(WRITE_AFTER_READ, (int64_t)i << grain);
    writer[i] = epoch << 16 | who;
    state[i] = is_set ? WRITTEN : 0;
    if (has_products) {
      stored[i] = clock_now;
      stored_by[i] = warp_now;
    }
  }
  if (value) memcpy(shared + at, value, size);
}
static void load_shared(Warp *W, const Instruction *I, uint32_t m) {
  int n = I->vector, bytes = n * I->size;
  uint32_t bad = m & ~SET(n), set = 0, from[32];
  if (bad) report(UNSET_ADDRESS, bad);
  EACH from[l] = V32(n)[l] + (uint32_t)I->offset;
  EACH {
    uint8_t value[16];
    memset(value, 0xff, 16);
    if (in_shared(from[l], bytes)) {
      set |= (uint32_t)read_shared(from[l], bytes, thread_of(W->id, l)) << l;
      memcpy(value, shared + from[l], bytes);
    }
    for (int i = 0; i < n; i++) {
      uint64_t x = 0;
      memcpy(&x, value + i * I->size, I->size);
      if (I->width == 8) V64(i)[l] = x;
      else V32(i)[l] = (uint32_t)x;
    }
  }
  for (int i = 0; i < n; i++) mark(W, I, i, m, set);
}
static void store_shared(Warp *W, const Instruction *I, uint32_t m) {
  int n = I->vector, bytes = n * I->size;
  uint32_t bad = m & ~SET(n), set = ~0u;
  if (bad) report(UNSET_ADDRESS, bad);
  EACH {
    uint8_t value[16];
    uint32_t to = V32(n)[l] + (uint32_t)I->offset;
    if (!in_shared(to, bytes)) continue;
    for (int i = 0; i < n; i++) {
      uint64_t x = lane_bits(W, I, i, l);
      memcpy(value, &x, I->size);
      set = SET(i);
      write_shared(to + i * I->size, I->size, thread_of(W->id, l), value, set >> l & 1);
    }
  }
}

// "bar.warp.sync": what its lanes did before is ordered before what they do after.
static uint32_t met(uint32_t trace, int warp) {
  uint32_t who = trace & 0xffff;
  return who && warp_of(who) == warp ? (trace & 0xffff0000u) | (MET + (uint32_t)warp) : trace;
}
static void sync_warp(Warp *W, const Instruction *I, uint32_t m) {
  EACH if ((V32(0)[l] & m) != V32(0)[l]) report(ABSENT_LANES, V32(0)[l] & ~m);
  if (m != 0xffffffffu) return;
  for (uint32_t i = 0; i < (shared_size + 15) >> grain; i++) {
    writer[i] = met(writer[i], W->id);
    reader[i] = met(reader[i], W->id);
  }
  for (int k = 0; k < n_ranges; k++)
    for (int64_t i = 0; i < item_at(ranges + k, ranges[k].high); i++) {
      Access *w = ranges[k].written + i, *r = ranges[k].read + i;
      if (w->program == program) w->who = met(w->who, W->id);
      if (r->program == program) r->who = met(r->who, W->id);
    }
}

// "cp.async": lands when its thread waits for its group; until then nobody may look, and only from
// then on its thread may, and others after a barrier. Fewer bytes than its size: the rest is zero.
static void copy_async(Warp *W, const Instruction *I, uint32_t m) {   // to, from, bytes; size
  if (m & ~(SET(0) & SET(1))) report(UNSET_ADDRESS, m);
  if (m & ~SET(2)) report(UNSET_CONDITION, m & ~SET(2));
  EACH {
    uint32_t to = V32(0)[l] + (uint32_t)I->offset, bytes = V32(2)[l];
    uint64_t from = V64(1)[l] + I->offset2;
    if (!in_shared(to, I->size)) continue;
    if (bytes > (uint32_t)I->size) bytes = I->size;
    if (bytes < (uint32_t)I->size) reached_flags[I - first_instruction] |= MASKED;
    if (from % I->size) report(MISALIGNED, from);
    if (bytes) {
      Range *range = range_of(from, bytes);
      if (!range) {
        report(READ_OUTSIDE, from);
        bytes = 0;
      } else trace_read(range, from, bytes, thread_of(W->id, l));
    }
    write_shared(to, I->size, thread_of(W->id, l), 0, 0);
    memset(shared + to, 0xff, I->size);
    for (uint32_t i = to >> grain; i <= (to + I->size - 1) >> grain; i++) state[i] = COPYING;
    if (W->n_copies == W->room) {
      W->room = 2 * W->room + 256;
      W->copies = realloc(W->copies, W->room * sizeof(Copy));
    }
    W->copies[W->n_copies++] = (Copy){l, I->size, bytes, W->commits, to, from};
  }
}
static void land(Warp *W, int before) {   // the groups before that one
  int kept = 0;
  for (int k = 0; k < W->n_copies; k++) {
    Copy c = W->copies[k];
    if (c.group >= before) {
      W->copies[kept++] = c;
      continue;
    }
    uint32_t who = thread_of(W->id, c.lane);
    for (uint32_t i = c.to >> grain; i <= (c.to + c.size - 1) >> grain; i++) {
      state[i] = WRITTEN;
      writer[i] = epoch << 16 | who;
      stored[i] = clock_now | BY_COPY;   // by the generic proxy, as an ordinary store
      stored_by[i] = W->id;
    }
    memset(shared + c.to, 0, c.size);
    if (c.bytes) memcpy(shared + c.to, (void *)c.from, c.bytes);
  }
  W->n_copies = kept;
}
static void commit_copies(Warp *W, const Instruction *I, uint32_t m) {
  if (m != W->alive) report(DIVERGED, m);
  W->commits++;
}
static void wait_copies(Warp *W, const Instruction *I, uint32_t m) {
  if (m != W->alive) report(DIVERGED, m);
  land(W, W->commits - (int)I->offset);
}
static void wait_all_copies(Warp *W, const Instruction *I, uint32_t m) { land(W, W->commits + 1); }

// "fence.proxy.async": the async proxy (wgmma) sees an ordinary store only if a fence lies on the
// path of barriers from the store to it: of the warp that stored, of one behind a barrier after the
// store, or the reader's own ("Proxy-preserved base causality order"). The clock counts fences and
// barriers; what a barrier has passed on is `fence_before`.
static uint32_t fences_passed_on;   // the latest fence of any warp before the last barrier
static uint32_t *barrier_after;     // by epoch of this program: the clock of its end
static void fence_async(Warp *W, const Instruction *I, uint32_t m) { W->fence = ++clock_now; }

static int seen_by_async(Warp *warps, Warp *W, uint32_t grain_number) {
  uint32_t t = stored[grain_number] & ~BY_COPY, stored_in = writer[grain_number] >> 16;
  if (!t) return 1;
  Warp *by = warps + stored_by[grain_number];
  if (by == W && W->fence > t) return 1;
  if (by->fence_before > t) return 1;
  if (stored_in >= epoch) return 0;
  uint32_t barrier = barrier_after[stored_in];
  return W->fence > barrier || fences_passed_on > barrier;
}

static void clear_shared(uint32_t size) {   // of another program before it
  uint32_t n = (size + 15) >> grain;
  memset(shared, 0xff, size);
  memset(state, 0, n);
  memset(pending, 0, (size + 15) / 16 * sizeof *pending);
  if (has_products) memset(stored, 0, n * sizeof *stored);
}
static void next_epoch(void) {
  if (has_products) barrier_after[epoch] = ++clock_now;
  if (++epoch < 0xffff) return;
  uint32_t n = (shared_size + 15) >> grain;   // numbers start anew: nothing before is of this epoch
  epoch = 1;
  barrier_after[0] = clock_now;
  memset(writer, 0, n * sizeof *writer);
  memset(reader, 0, n * sizeof *reader);
  for (int k = 0; k < n_ranges; k++)
    for (int64_t i = 0; i <= item_at(ranges + k, ranges[k].high); i++)
      ranges[k].written[i].who = ranges[k].read[i].who = 0;
}
