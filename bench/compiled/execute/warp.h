// Warps, their registers, and what is wrong with what they do.
enum Kind {   // the order of KINDS in machine.py
  READ_OUTSIDE, WRITE_OUTSIDE, SHARED_OUTSIDE, MISALIGNED,
  WRITE_AFTER_READ, WRITE_AFTER_WRITE, READ_AFTER_WRITE, PROGRAMS_RACE,
  COPY_UNFINISHED, UNSEEN_BY_ASYNC, COPY_UNSEEN_BY_ASYNC, WGMMA_READS, WGMMA_REGISTER, WGMMA_FENCE,
  UNSET_ADDRESS, UNSET_CONDITION, UNSET_STORED, UNSET_OPERAND,
  ABSENT_LANES, DIVERGED, BARRIER_DIVERGED, NO_END, TRAPPED
};

typedef struct {
  int32_t op, guard, negate, target, line;
  int32_t first, count;           // its operands: slots, from operands[first]
  int32_t size, vector, width;    // memory: bytes an element, elements, bytes of its register
  int64_t offset, offset2;        // added to its addresses, or an immediate
} Instruction;

// A register has one slot of 32 × 4 bytes, or two where it has 64 bits. A predicate is one word of
// its slot, a bit a lane.
typedef struct {
  uint32_t set;      // lanes whose value does not come from something that was never written
  uint32_t fences;   // of wgmma: how many there had been at its last use by anything else
} Trace;

typedef struct { int lane, size, bytes, group; uint32_t to; uint64_t from; } Copy;

typedef struct {   // a wgmma.mma_async from its issue to its wait
  const Instruction *I;
  int group, negate;
  uint8_t unset_a[16], unset_b[256];
  float A[16][16], B[16][256];
  uint32_t *chunks;   // shared memory that it reads, in chunks of 16 bytes
  int n_chunks, scale;
} Product;

enum { MOST_PRODUCTS = 64 };

typedef struct {
  uint32_t *values;
  Trace *traces;
  uint8_t *busy;        // slots that a wgmma under way reads (1) or writes (2)
  int id, pc[32];
  uint32_t alive;
  int finished;
  int commits, n_copies, room;
  Copy *copies;
  int wgmma_commits, n_products;
  uint32_t wgmma_fences;
  Product *products;
  uint32_t fence, fence_before;   // clock of its last fence.proxy.async; the one before the barrier
} Warp;

enum { REACHED = 1, MASKED = 2 };   // executed; and with lanes that its guard or its size left out
static const Instruction *first_instruction;
static uint8_t *reached_flags;

static const int32_t *operands;
static int line_now;              // of the PTX
static int64_t *violations;       // [LIMIT, 3]: kind, line, detail
static int n_violations;
enum { LIMIT = 64 };

static void report(enum Kind kind, int64_t detail) {
  for (int i = 0; i < n_violations; i++)
    if (violations[3 * i] == kind && violations[3 * i + 1] == line_now) return;
  if (n_violations == LIMIT) return;
  int64_t *next = violations + 3 * n_violations++;
  next[0] = kind;
  next[1] = line_now;
  next[2] = detail;
}

#define SLOT(k) operands[I->first + (k)]
#define V32(k) (W->values + 32 * (size_t)SLOT(k))
#define V64(k) ((uint64_t *)V32(k))
#define SET(k) (W->traces[SLOT(k)].set)
#define EACH for (int l = 0; l < 32; l++) if (m >> l & 1)

static inline uint64_t lane_bits(Warp *W, const Instruction *I, int k, int l) {
  return I->width == 8 ? V64(k)[l] : V32(k)[l];
}

static inline void mark(Warp *W, const Instruction *I, int k, uint32_t m, uint32_t set) {
  Trace *trace = W->traces + SLOT(k);
  trace->set = (trace->set & ~m) | (set & m);
}
static inline void put32(Warp *W, const Instruction *I, int k, const uint32_t *value, uint32_t m) {
  uint32_t *to = V32(k);
  if (m == 0xffffffffu) memcpy(to, value, 128);
  else EACH to[l] = value[l];
}
static inline void put64(Warp *W, const Instruction *I, int k, const uint64_t *value, uint32_t m) {
  uint64_t *to = V64(k);
  if (m == 0xffffffffu) memcpy(to, value, 256);
  else EACH to[l] = value[l];
}
static inline void put_predicate(Warp *W, const Instruction *I, int k, uint32_t bits, uint32_t m) {
  *V32(k) = (*V32(k) & ~m) | (bits & m);
}

// ---- operations of registers whose operands are not of one lane, or not all needed

static void select32(Warp *W, const Instruction *I, uint32_t m) {   // d, a, b, p: p ? a : b
  uint32_t p = *V32(3), value[32], set = SET(3) & ((p & SET(1)) | (~p & SET(2)));
  for (int l = 0; l < 32; l++) value[l] = p >> l & 1 ? V32(1)[l] : V32(2)[l];
  put32(W, I, 0, value, m);
  mark(W, I, 0, m, set);
}
static void select64(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t p = *V32(3), set = SET(3) & ((p & SET(1)) | (~p & SET(2)));
  uint64_t value[32];
  for (int l = 0; l < 32; l++) value[l] = p >> l & 1 ? V64(1)[l] : V64(2)[l];
  put64(W, I, 0, value, m);
  mark(W, I, 0, m, set);
}
// A false operand decides an "and" whatever the other one is, a true one an "or".
static void and_predicate(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t a = *V32(1), b = *V32(2), set = (SET(1) & SET(2)) | (SET(1) & ~a) | (SET(2) & ~b);
  put_predicate(W, I, 0, a & b, m);
  mark(W, I, 0, m, set);
}
static void or_predicate(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t a = *V32(1), b = *V32(2), set = (SET(1) & SET(2)) | (SET(1) & a) | (SET(2) & b);
  put_predicate(W, I, 0, a | b, m);
  mark(W, I, 0, m, set);
}
static void xor_predicate(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t bits = *V32(1) ^ *V32(2), set = SET(1) & SET(2);
  put_predicate(W, I, 0, bits, m);
  mark(W, I, 0, m, set);
}
static void not_predicate(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t set = SET(1);
  put_predicate(W, I, 0, ~*V32(1), m);
  mark(W, I, 0, m, set);
}
static void move_predicate(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t set = SET(1);
  put_predicate(W, I, 0, *V32(1), m);
  mark(W, I, 0, m, set);
}

// mov.b32 d, {a, b} and its like: `size` bytes each, the first lowest.
static void pack(Warp *W, const Instruction *I, uint32_t m) {
  uint64_t wide[32];
  uint32_t narrow[32], set = ~0u, bits = 8 * I->size;
  for (int i = 1; i < I->count; i++) set &= SET(i);
  for (int l = 0; l < 32; l++) {
    uint64_t x = 0;
    for (int i = I->count - 1; i > 0; i--)
      x = x << bits | (V32(i)[l] & (bits == 32 ? 0xffffffffu : (1u << bits) - 1));
    wide[l] = x;
    narrow[l] = (uint32_t)x;
  }
  if (I->width == 8) put64(W, I, 0, wide, m);
  else put32(W, I, 0, narrow, m);
  mark(W, I, 0, m, set);
}
static void unpack(Warp *W, const Instruction *I, uint32_t m) {   // a, then the parts
  uint64_t x[32];
  uint32_t part[32], set = SET(0), bits = 8 * I->size;
  for (int l = 0; l < 32; l++) x[l] = lane_bits(W, I, 0, l);
  for (int i = 1; i < I->count; i++) {
    for (int l = 0; l < 32; l++)
      part[l] = (uint32_t)(x[l] >> (i - 1) * bits) & (bits == 32 ? 0xffffffffu : (1u << bits) - 1);
    put32(W, I, i, part, m);
    mark(W, I, i, m, set);
  }
}

// "shfl.sync": d|p, a, b, c, membermask. Lanes must be named, present and execute it together;
// reading from one that is not is undefined. size: 0 idx, 1 up, 2 down, 3 bfly.
static void shuffle(Warp *W, const Instruction *I, uint32_t m) {
  uint32_t value[32] = {0}, inside = 0, set = 0;
  EACH {
    uint32_t b = V32(2)[l] & 31, c = V32(3)[l], members = V32(4)[l];
    if ((members & m) != members || !(members >> l & 1)) report(ABSENT_LANES, members & ~m);
    int segment = c >> 8 & 31, clamp = c & 31;
    int most = (l & segment) | (clamp & ~segment), least = l & segment, from, p;
    switch (I->size) {
      case 1: from = l - (int)b; p = from >= most; break;
      case 2: from = l + (int)b; p = from <= most; break;
      case 3: from = l ^ (int)b; p = from <= most; break;
      default: from = least | ((int)b & ~segment); p = from <= most;
    }
    if (!p) from = l;
    if (!(m >> from & 1)) report(ABSENT_LANES, from);
    value[l] = V32(1)[from];
    inside |= (uint32_t)p << l;
    set |= (SET(1) >> from & 1) << l;
  }
  set &= SET(2) & SET(3) & SET(4);
  put32(W, I, 0, value, m);
  mark(W, I, 0, m, set);
  if (I->count > 5) {
    put_predicate(W, I, 5, inside, m);
    mark(W, I, 5, m, ~0u);
  }
}
// "redux.sync": d, a, membermask. size: 0 min, 1 max, 2 add, 3 and, 4 or, 5 xor; vector: signed.
static void reduce(Warp *W, const Instruction *I, uint32_t m) {
  int64_t result = 0;
  int first = 1;
  uint32_t value[32], set = (SET(1) & SET(2) & m) == m ? ~0u : 0;
  EACH {
    if ((V32(2)[l] & m) != V32(2)[l] || !(V32(2)[l] >> l & 1)) report(ABSENT_LANES, l);
    int64_t v = I->vector ? (int64_t)(int32_t)V32(1)[l] : (int64_t)V32(1)[l];
    if (first) result = v;
    else switch (I->size) {
      case 0: result = v < result ? v : result; break;
      case 1: result = v > result ? v : result; break;
      case 2: result += v; break;
      case 3: result &= v; break;
      case 4: result |= v; break;
      default: result ^= v;
    }
    first = 0;
  }
  for (int l = 0; l < 32; l++) value[l] = (uint32_t)result;
  put32(W, I, 0, value, m);
  mark(W, I, 0, m, set);
}
