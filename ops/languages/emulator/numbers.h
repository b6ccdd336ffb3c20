// half and bfloat16 of 16 bits: each operation in float32, then rounded to the nearest, ties to even. A float has more
// than twice their digits and two, so this is the right rounding of + - * / and of a root.
#pragma once
#include "simt.h"

namespace simt {

inline float float_of_half(uint16_t h) {
  uint32_t bits = (h & 0x7fffu) << 13;
  float scaled = bits_as<float>(bits) * 0x1p112f;  // exponents of half begin at -14, of float at -126: subnormals too
  uint32_t out = bits_as<uint32_t>(scaled);
  if ((h & 0x7c00) == 0x7c00) out = bits | 0x7f800000u;  // infinities and NaNs
  return bits_as<float>(out | (h & 0x8000u) << 16);
}

inline uint16_t half_of_float(float f) {
  uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more: infinite
  if (size < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2**-24, rounded by the machine
    float moved = bits_as<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(moved) - bits_as<uint32_t>(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13));
}

inline float float_of_bfloat16(uint16_t b) { return bits_as<float>(static_cast<uint32_t>(b) << 16); }

inline uint16_t bfloat16_of_float(float f) {
  uint32_t bits = bits_as<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

template <class T> struct is_number { static constexpr bool value = false; };
#define SIMT_NUMBER(T) template <> struct is_number<T> { static constexpr bool value = true; };
SIMT_NUMBER(bool) SIMT_NUMBER(char) SIMT_NUMBER(signed char) SIMT_NUMBER(unsigned char)
SIMT_NUMBER(short) SIMT_NUMBER(unsigned short) SIMT_NUMBER(int) SIMT_NUMBER(unsigned) SIMT_NUMBER(long)
SIMT_NUMBER(unsigned long) SIMT_NUMBER(long long) SIMT_NUMBER(unsigned long long) SIMT_NUMBER(float) SIMT_NUMBER(double)
#undef SIMT_NUMBER
template <bool, class T> struct only_if {};
template <class T> struct only_if<true, T> { using type = T; };

// A float of 16 bits. `From` and `To` convert; trivial, so that shared arrays and unions may hold it.
template <uint16_t (*From)(float), float (*To)(uint16_t)>
struct Float16 {
  uint16_t bits;
  Float16() = default;
  template <class N, class = typename only_if<is_number<N>::value, N>::type>
  constexpr Float16(N n) : bits(From(static_cast<float>(n))) {}
  template <uint16_t (*F)(float), float (*T)(uint16_t)>
  explicit Float16(Float16<F, T> other) : bits(From(static_cast<float>(other))) {}
  operator float() const { return To(bits); }
  static Float16 of_bits(uint16_t bits) {
    Float16 made;
    made.bits = bits;
    return made;
  }
  Float16& operator+=(Float16 b) { return *this = *this + b; }
  Float16& operator-=(Float16 b) { return *this = *this - b; }
  Float16& operator*=(Float16 b) { return *this = *this * b; }
  Float16& operator/=(Float16 b) { return *this = *this / b; }
  Float16 operator-() const { return of_bits(bits ^ 0x8000u); }
  Float16 operator+() const { return *this; }
};

// Templates, so that a half beside a float is a float, as where the language converts.
#define SIMT_OPERATOR(op, R)                                                \
  template <uint16_t (*F)(float), float (*T)(uint16_t)>                     \
  inline R operator op(Float16<F, T> a, Float16<F, T> b) {                  \
    return T(a.bits) op T(b.bits);                                          \
  }
SIMT_OPERATOR(==, bool) SIMT_OPERATOR(!=, bool) SIMT_OPERATOR(<, bool)
SIMT_OPERATOR(>, bool) SIMT_OPERATOR(<=, bool) SIMT_OPERATOR(>=, bool)
#undef SIMT_OPERATOR
#define SIMT_OPERATOR(op)                                                   \
  template <uint16_t (*F)(float), float (*T)(uint16_t)>                     \
  inline Float16<F, T> operator op(Float16<F, T> a, Float16<F, T> b) {      \
    return T(a.bits) op T(b.bits);                                          \
  }
SIMT_OPERATOR(+) SIMT_OPERATOR(-) SIMT_OPERATOR(*) SIMT_OPERATOR(/)
#undef SIMT_OPERATOR

using half = Float16<half_of_float, float_of_half>;
using bfloat16 = Float16<bfloat16_of_float, float_of_bfloat16>;

// a * b + c, rounded once: a double holds the product, and the sum to far beyond the last digit.
template <class T>
inline T fused(T a, T b, T c) {
  double exact = static_cast<double>(static_cast<float>(a)) * static_cast<float>(b) + static_cast<float>(c);
  float near = static_cast<float>(exact);
  if (static_cast<double>(near) != exact) {  // to odd, so that rounding again cannot tip a tie
    uint32_t bits = bits_as<uint32_t>(near);
    bool above = (near > exact) == (near > 0);  // `near` is further from zero than what it stands for
    if (!(bits & 1) && near != 0 && near - near == 0) near = bits_as<float>(above ? bits - 1 : bits + 1);
  }
  return T(near);
}

}  // namespace simt
