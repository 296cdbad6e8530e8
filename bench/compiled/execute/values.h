// Numbers as a lane sees them. Sections named in quotes are those of NVIDIA's "PTX ISA".
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float as_f32(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double as_f64(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint32_t bits_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t bits_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }

// .ftz: a subnormal becomes a zero of its sign ("Floating Point Instructions").
static inline float FTZ(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
static inline double coarse(double x) { return as_f64(bits_f64(x) & 0xffffffff00000000u); }

static inline float from_bf16(uint32_t bits) { return as_f32(bits << 16); }
static inline uint32_t to_bf16(float x) {
  uint32_t bits = bits_f32(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// One rounding: on the way there, what is left over makes the last bit odd.
static inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  double product = (double)from_bf16(a) * from_bf16(b), term = from_bf16(c), sum = product + term;
  double back = sum - product, rest = (product - (sum - back)) + (term - back);
  if (sum - sum != 0) return to_bf16((float)sum);
  uint64_t bits = bits_f64(sum), below = bits & 0x1fffffff;
  if (!below && rest != 0 && (rest < 0) != (sum < 0)) bits--;
  bits = (bits & ~0x1fffffffull) | (uint64_t)(below || rest != 0) << 29;
  return to_bf16((float)as_f64(bits));
}

static inline float from_f16(uint32_t bits) {
  uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, digits = bits & 1023;
  if (exponent == 0) return copysignf((float)digits * 0x1p-24f, as_f32(sign));
  if (exponent == 31) return as_f32(sign | 0x7f800000 | digits << 13);
  return as_f32(sign | (exponent + 112) << 23 | digits << 13);
}
static inline uint32_t to_f16(float x) {
  uint32_t bits = bits_f32(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (size >= 0x47800000) return sign | 0x7c00;                          // 65536 and more
  if (size < 0x38800000) return sign | (uint32_t)rintf(as_f32(size) * 0x1p24f);   // subnormal
  return sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
}

// .rna: to nearest, halves away from zero. What a tensor core reads of a tf32: "the lower 13 bits
// are ignored" ("Alternate Floating-Point Data Formats").
static inline uint32_t to_tf32(float x) {
  uint32_t bits = bits_f32(x);
  return (bits >> 23 & 255) == 255 ? bits : (bits + 0x1000) & ~0x1fffu;
}
static inline float from_tf32(uint32_t bits) { return as_f32(bits & ~0x1fffu); }

// Floats to integers saturate; a NaN is 0, or the top bit where 64 bits take part ("cvt").
#define SATURATING(NAME, TYPE, LOW, HIGH, LEAST, MOST, TOP)              \
  static inline TYPE to_##NAME(double x, int wide) {                     \
    if (x != x) return wide ? TOP : 0;                                   \
    return x <= LOW ? LEAST : x >= HIGH ? MOST : (TYPE)x;                \
  }
SATURATING(s16, int16_t, -32768.0, 32767.0, INT16_MIN, INT16_MAX, INT16_MIN)
SATURATING(u16, uint16_t, 0.0, 65535.0, 0, UINT16_MAX, 0x8000)
SATURATING(s32, int32_t, -0x1p31, 0x1p31, INT32_MIN, INT32_MAX, INT32_MIN)
SATURATING(u32, uint32_t, 0.0, 0x1p32, 0, UINT32_MAX, 0x80000000u)
SATURATING(s64, int64_t, -0x1p63, 0x1p63, INT64_MIN, INT64_MAX, INT64_MIN)
SATURATING(u64, uint64_t, 0.0, 0x1p64, 0, UINT64_MAX, 0x8000000000000000u)

#define EXTREME(NAME, TYPE, FIRST, SECOND, ZERO)                         \
  static inline TYPE NAME(TYPE a, TYPE b, int nan_wins) {                \
    if (a != a || b != b) return nan_wins ? NAN : a != a ? b : a;        \
    if (a == b) return signbit(a) ? FIRST : SECOND;                      \
    return ZERO ? a : b;                                                 \
  }
EXTREME(minimum_f32, float, a, b, a < b)
EXTREME(maximum_f32, float, b, a, a > b)
EXTREME(minimum_f64, double, a, b, a < b)
EXTREME(maximum_f64, double, b, a, a > b)

// "bfe": `count` bits from bit `at`; beyond the register the sign, or 0. Only the low 8 bits of
// both numbers count.
static inline uint32_t extract(uint32_t a, uint32_t at, uint32_t count, int is_signed) {
  at &= 255;
  count &= 255;
  if (count == 0) return 0;
  int64_t x = is_signed ? (int64_t)(int32_t)a : (int64_t)a;
  x >>= at > 63 ? 63 : at;
  if (count >= 32) return (uint32_t)x;
  uint32_t kept = (uint32_t)x & ((1u << count) - 1);
  if (!is_signed) return kept;
  // The sign is that of the field's last bit, or of a's own where the field ends beyond it.
  uint32_t last = at + count - 1 > 31 ? 31 : at + count - 1;
  return a >> last & 1 ? kept | ~((1u << count) - 1) : kept;
}
// "bfi": the low `count` bits of a over b, from bit `at`.
static inline uint32_t insert(uint32_t a, uint32_t b, uint32_t at, uint32_t count) {
  at &= 255;
  count &= 255;
  if (at > 31) return b;
  uint32_t mask = (count >= 32 ? ~0u : (1u << count) - 1) << at;
  return (b & ~mask) | (a << at & mask);
}
// "prmt", default mode: four selectors of 4 bits: a byte of b:a, or its sign eight times.
static inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t selector = selectors >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
// "lop3": bit abc of the table, for every bit.
static inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
static inline uint32_t reverse(uint32_t a) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
  return result;
}
