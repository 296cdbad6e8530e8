// Matrix instructions. Products are added up in float32, in the order of k.
// g = lane / 4 and t = lane % 4 place a lane's registers in a fragment ("Matrix Fragments").
enum { BF16, F16, TF32 };

static inline float half_of(uint32_t bits, int high, int kind) {
  uint32_t half = high ? bits >> 16 : bits & 0xffff;
  return kind == BF16 ? from_bf16(half) : from_f16(half);
}
static void whole_warp(Warp *W, uint32_t m) {   // .aligned: every lane, and all of them alive
  if (m != 0xffffffffu) report(DIVERGED, m);
}

// "ldmatrix", "stmatrix": 8 × 8 matrices of 16 bits; lanes 8 j to 8 j + 7 hold the addresses of the
// rows of matrix j. width: transposed.
// registers, address
static void load_matrix(Warp *W, const Instruction *I, uint32_t m) {
  uint16_t rows[4][8][8];
  uint8_t set[4][8];
  int n = I->vector;
  whole_warp(W, m);
  if (SET(n) != 0xffffffffu) report(UNSET_ADDRESS, ~SET(n));
  for (int j = 0; j < n; j++) for (int r = 0; r < 8; r++) {
    uint32_t at = V32(n)[8 * j + r] + (uint32_t)I->offset;
    set[j][r] = 0;
    memset(rows[j][r], 0xff, 16);
    if (!in_shared(at, 16)) continue;
    set[j][r] = read_shared(at, 16, thread_of(W->id, 8 * j + r));
    memcpy(rows[j][r], shared + at, 16);
  }
  for (int j = 0; j < n; j++) {
    uint32_t value[32], known = 0;
    for (int l = 0; l < 32; l++) {
      int g = l / 4, t = l % 4;
      if (I->width) {
        value[l] = rows[j][2 * t][g] | (uint32_t)rows[j][2 * t + 1][g] << 16;
        known |= (uint32_t)(set[j][2 * t] && set[j][2 * t + 1]) << l;
      } else {
        value[l] = rows[j][g][2 * t] | (uint32_t)rows[j][g][2 * t + 1] << 16;
        known |= (uint32_t)set[j][g] << l;
      }
    }
    put32(W, I, j, value, 0xffffffffu);
    mark(W, I, j, 0xffffffffu, known);
  }
}
static void store_matrix(Warp *W, const Instruction *I, uint32_t m) {   // registers, address
  int n = I->vector;
  whole_warp(W, m);
  if (SET(n) != 0xffffffffu) report(UNSET_ADDRESS, ~SET(n));
  for (int j = 0; j < n; j++) {
    uint16_t rows[8][8];
    uint8_t set[8];
    memset(set, 1, 8);
    for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) {
      int g = l / 4, column = 2 * (l % 4) + h;
      int row = I->width ? column : g;
      rows[row][I->width ? g : column] = (uint16_t)(V32(j)[l] >> 16 * h);
      set[row] &= SET(j) >> l & 1;
    }
    for (int r = 0; r < 8; r++) {
      uint32_t at = V32(n)[8 * j + r] + (uint32_t)I->offset;
      uint32_t who = thread_of(W->id, 8 * j + r);
      if (in_shared(at, 16)) write_shared(at, 16, who, (uint8_t *)rows[r], set[r]);
    }
  }
}

// D = A B + C, from fragments to fragments. Rows of A, columns of B and entries of C may be unset.
typedef struct {
  float A[16][16], B[16][8], C[16][8];
  uint8_t unset_a[16], unset_b[8], unset_c[16][8];
} Fragments;

static void multiply(Warp *W, const Instruction *I, Fragments *x, int depth) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < 8; j++) x->C[i][j] += x->A[i][k] * x->B[k][j];
  for (int r = 0; r < 4; r++) {
    uint32_t value[32], set = 0;
    for (int l = 0; l < 32; l++) {
      int i = l / 4 + 8 * (r >> 1), j = 2 * (l % 4) + (r & 1);
      value[l] = bits_f32(x->C[i][j]);
      set |= (uint32_t)!(x->unset_a[i] | x->unset_b[j] | x->unset_c[i][j]) << l;
    }
    put32(W, I, r, value, 0xffffffffu);
    mark(W, I, r, 0xffffffffu, set);
  }
}
static void accumulators(Warp *W, const Instruction *I, Fragments *x, int first) {
  for (int r = 0; r < 4; r++) for (int l = 0; l < 32; l++) {
    int i = l / 4 + 8 * (r >> 1), j = 2 * (l % 4) + (r & 1);
    x->C[i][j] = as_f32(V32(first + r)[l]);
    x->unset_c[i][j] = !(SET(first + r) >> l & 1);
  }
}
// "mma.sync": d[4], a, b, c[4]. size: kind; vector: depth.
static void multiply_halves(Warp *W, const Instruction *I, uint32_t m) {   // m16n8k16, m16n8k8
  static Fragments x;
  int kind = I->size, depth = I->vector, a = depth / 4, b = depth / 8;
  memset(&x, 0, sizeof x);
  whole_warp(W, m);
  for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) {
    int g = l / 4, t = l % 4;
    for (int r = 0; r < a; r++) {
      x.A[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = half_of(V32(4 + r)[l], h, kind);
      x.unset_a[g + 8 * (r & 1)] |= !(SET(4 + r) >> l & 1);
    }
    for (int r = 0; r < b; r++) {
      x.B[2 * t + h + 8 * r][g] = half_of(V32(4 + a + r)[l], h, kind);
      x.unset_b[g] |= !(SET(4 + a + r) >> l & 1);
    }
  }
  accumulators(W, I, &x, 4 + a + b);
  multiply(W, I, &x, depth);
}
static void multiply_tf32(Warp *W, const Instruction *I, uint32_t m) {   // m16n8k8, m16n8k4
  static Fragments x;
  int depth = I->vector, a = depth / 2, b = depth / 4;
  memset(&x, 0, sizeof x);
  whole_warp(W, m);
  for (int l = 0; l < 32; l++) {
    int g = l / 4, t = l % 4;
    for (int r = 0; r < a; r++) {
      x.A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = from_tf32(V32(4 + r)[l]);
      x.unset_a[g + 8 * (r & 1)] |= !(SET(4 + r) >> l & 1);
    }
    for (int r = 0; r < b; r++) {
      x.B[t + 4 * r][g] = from_tf32(V32(4 + a + r)[l]);
      x.unset_b[g] |= !(SET(4 + a + r) >> l & 1);
    }
  }
  accumulators(W, I, &x, 4 + a + b);
  multiply(W, I, &x, depth);
}

// "wgmma.mma_async": [a in registers: 4, or its descriptor], descriptor of b, scale-d, d.
// size: columns n; vector: kind; width: flags. Operands are read from the issue on, results are
// there at the wait: shared memory is read and marked at issue, registers are added to at the wait.
enum { A_IN_REGISTERS = 1, A_TRANSPOSED = 2, B_TRANSPOSED = 4, A_NEGATED = 8, B_NEGATED = 16 };
static Warp *all_warps;

// Address of 16 bytes of an operand ("Matrix Descriptor Format", "Shared Memory Matrix Layout",
// "Strides"): entries mn, k on where k is contiguous, or mn on where the operand is transposed.
static uint32_t chunk_address(uint64_t descriptor, int mn, int k, int item, int transposed) {
  uint32_t start = (descriptor & 0x3fff) << 4;
  uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  int mode = descriptor >> 62;   // 0: no swizzle, 1: 128 bytes, 2: 64, 3: 32
  int pitch = mode == 0 ? 16 : 256 >> mode, items = pitch / item;
  uint32_t at;
  if (mode == 0) {
    int down = transposed ? k : mn, across = transposed ? mn * item / 16 : k * item / 16;
    at = start + down % 8 * 16;
    at += transposed ? across * stride + down / 8 * leading : down / 8 * stride + across * leading;
  } else if (transposed) {
    at = start + mn / items * leading + k / 8 * stride + k % 8 * pitch + mn % items * item;
  } else {
    at = start + mn / 8 * stride + mn % 8 * pitch + k * item;
  }
  // Swizzling: address bits 4 to 6 are exclusively or-ed with bits 7 to 9, as many as the mode has.
  uint32_t swizzled = mode == 0 ? 0 : mode == 1 ? 7 : mode == 2 ? 3 : 1;
  return at ^ (at >> 7 & swizzled) << 4;
}
static int read_chunk(Warp *W, Product *x, uint32_t at, uint8_t *value) {
  memset(value, 0xff, 16);
  if (!in_shared(at, 16)) return 0;
  int set = WRITTEN;
  for (uint32_t i = at >> grain, n = (at + 15) >> grain; i <= n; i++) {
    uint32_t r = reader[i], me = MET + (uint32_t)W->id;
    if (writer[i] >> 16 == epoch) report(READ_AFTER_WRITE, (int64_t)i << grain);
    if (!seen_by_async(all_warps, W, i))
      report(stored[i] & BY_COPY ? COPY_UNSEEN_BY_ASYNC : UNSEEN_BY_ASYNC, (int64_t)i << grain);
    if (state[i] & COPYING) report(COPY_UNFINISHED, (int64_t)i << grain);
    reader[i] = epoch << 16 | (r >> 16 == epoch ? joined(r & 0xffff, me) : me);
    set &= state[i];
  }
  pending[at >> 4]++;
  x->chunks[x->n_chunks++] = at >> 4;
  memcpy(value, shared + at, 16);
  return set;
}
static inline float item_of(const uint8_t *chunk, int i, int kind) {
  uint32_t word;
  uint16_t half;
  if (kind == TF32) {
    memcpy(&word, chunk + 4 * i, 4);
    return from_tf32(word);
  }
  memcpy(&half, chunk + 2 * i, 2);
  return half_of(half, 0, kind);
}
// `count` rows of A or columns of B, from `first` on; entry (mn, k) goes to
// to[k * k_step + mn * mn_step].
static void read_operand(Warp *W, Product *x, uint64_t descriptor, int first, int count,
                         int transposed, float *to, int k_step, int mn_step, uint8_t *unset) {
  int kind = x->I->vector, item = kind == TF32 ? 4 : 2, depth = 32 / item, per = 16 / item;
  int mn_per = transposed ? per : 1, k_per = transposed ? 1 : per;   // entries of a chunk
  uint8_t chunk[16];
  for (int mn = 0; mn < count; mn += mn_per) for (int k = 0; k < depth; k += k_per) {
    uint32_t at = chunk_address(descriptor, first + mn, k, item, transposed);
    int set = read_chunk(W, x, at, chunk);
    for (int e = 0; e < per; e++) {
      int row = mn + (transposed ? e : 0), column = k + (transposed ? 0 : e);
      to[column * k_step + row * mn_step] = item_of(chunk, e, kind);
      unset[row] |= !set;
    }
  }
}
static void wgmma_issue(Warp *W, const Instruction *I, uint32_t m) {
  int in_registers = I->width & A_IN_REGISTERS, na = in_registers ? 4 : 1, n = I->size;
  int kind = I->vector;
  whole_warp(W, m);
  if (W->n_products == MOST_PRODUCTS) {
    report(WGMMA_REGISTER, MOST_PRODUCTS);
    return;
  }
  Product *x = W->products + W->n_products++;
  x->I = I;
  x->group = W->wgmma_commits;
  x->scale = *V32(na + 1) & 1;
  x->negate = !(I->width & A_NEGATED) != !(I->width & B_NEGATED);
  x->n_chunks = 0;
  memset(x->unset_a, 0, sizeof x->unset_a);
  memset(x->unset_b, 0, sizeof x->unset_b);
  if (SET(na + 1) != 0xffffffffu) report(UNSET_CONDITION, na + 1);
  if (!in_registers && SET(0) != 0xffffffffu) report(UNSET_ADDRESS, 0);
  if (SET(na) != 0xffffffffu) report(UNSET_ADDRESS, na);
  // "wgmma.fence": before the first one, and after other instructions used d or a.
  for (int k = 0; k < I->count; k++) {
    int is_register = k > na + 1 || (in_registers && k < 4);
    if (is_register && W->traces[SLOT(k)].fences == W->wgmma_fences) report(WGMMA_FENCE, k);
    if (k > na + 1) W->busy[SLOT(k)]++;
  }
  int first = 16 * (W->id % 4);   // rows of A are a warp's own: 16 of 64
  if (in_registers) {
    for (int r = 0; r < 4; r++) for (int l = 0; l < 32; l++) {
      int i = l / 4 + 8 * (r & 1), t = l % 4;
      x->unset_a[i] |= !(SET(r) >> l & 1);
      if (kind == TF32) {
        x->A[i][t + 4 * (r >> 1)] = from_tf32(V32(r)[l]);
        continue;
      }
      for (int h = 0; h < 2; h++)
        x->A[i][2 * t + h + 8 * (r >> 1)] = half_of(V32(r)[l], h, kind);
    }
  } else {
    int transposed = !!(I->width & A_TRANSPOSED);
    read_operand(W, x, *V64(0), first, 16, transposed, x->A[0], 1, 16, x->unset_a);
  }
  int transposed = !!(I->width & B_TRANSPOSED);
  read_operand(W, x, *V64(na), 0, n, transposed, x->B[0], 256, 1, x->unset_b);
}
static void finish_product(Warp *W, Product *x) {
  static float C[16][256];
  const Instruction *I = x->I;
  int depth = I->vector == TF32 ? 8 : 16, n = I->size;
  int d = (I->width & A_IN_REGISTERS ? 4 : 1) + 2;
  for (int k = 0; k < x->n_chunks; k++) pending[x->chunks[k]]--;
  for (int r = 0; r < n / 2; r++) for (int l = 0; l < 32; l++) {
    float c = x->scale ? as_f32(V32(d + r)[l]) : 0;
    C[l / 4 + 8 * (r >> 1 & 1)][r / 4 * 8 + 2 * (l % 4) + (r & 1)] = c;
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < depth; k++) {
      float a = x->negate ? -x->A[i][k] : x->A[i][k];
      for (int j = 0; j < n; j++) C[i][j] += a * x->B[k][j];
    }
  for (int r = 0; r < n / 2; r++) {
    uint32_t *to = V32(d + r), set = 0;
    for (int l = 0; l < 32; l++) {
      int i = l / 4 + 8 * (r >> 1 & 1), j = r / 4 * 8 + 2 * (l % 4) + (r & 1);
      to[l] = bits_f32(C[i][j]);
      set |= (uint32_t)!(x->unset_a[i] | x->unset_b[j]) << l;
    }
    if (x->scale) set &= SET(d + r);
    SET(d + r) = set;
    W->busy[SLOT(d + r)]--;
  }
}
static void wgmma_fence(Warp *W, const Instruction *I, uint32_t m) {
  whole_warp(W, m);
  W->wgmma_fences++;
}
static void wgmma_commit(Warp *W, const Instruction *I, uint32_t m) {
  whole_warp(W, m);
  W->wgmma_commits++;
}
// For all groups but the last few.
static void wgmma_wait(Warp *W, const Instruction *I, uint32_t m) {
  int kept = 0;
  whole_warp(W, m);
  for (int i = 0; i < W->n_products; i++) {
    Product *x = W->products + i;
    if (x->group < W->wgmma_commits - (int)I->offset) {
      finish_product(W, x);
    } else {
      if (kept < i) {   // exchanged, so that each keeps a list of chunks of its own
        Product other = W->products[kept];
        W->products[kept] = *x;
        *x = other;
      }
      kept++;
    }
  }
  W->n_products = kept;
}
