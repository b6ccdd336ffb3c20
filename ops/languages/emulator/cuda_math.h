// CUDA's arithmetic functions that C's math.h does not have. The fast ones (__expf) are as exact as the others here.
#pragma once
#include "cuda.h"

#define SIMT_FLOAT(name) inline float name(float x) { return __builtin_##name##f(x); }  // CUDA overloads C's names
SIMT_FLOAT(exp) SIMT_FLOAT(exp2) SIMT_FLOAT(expm1) SIMT_FLOAT(log) SIMT_FLOAT(log2) SIMT_FLOAT(log10) SIMT_FLOAT(log1p)
SIMT_FLOAT(sqrt) SIMT_FLOAT(cbrt) SIMT_FLOAT(sin) SIMT_FLOAT(cos) SIMT_FLOAT(tan) SIMT_FLOAT(asin) SIMT_FLOAT(acos)
SIMT_FLOAT(atan) SIMT_FLOAT(sinh) SIMT_FLOAT(cosh) SIMT_FLOAT(tanh) SIMT_FLOAT(erf) SIMT_FLOAT(erfc) SIMT_FLOAT(fabs)
SIMT_FLOAT(floor) SIMT_FLOAT(ceil) SIMT_FLOAT(round) SIMT_FLOAT(trunc) SIMT_FLOAT(rint)
#undef SIMT_FLOAT
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }
inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }

inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float rcbrtf(float x) { return 1.0f / __builtin_cbrtf(x); }
inline float sinpif(float x) { return static_cast<float>(__builtin_sin(x * 3.14159265358979323846)); }
inline float cospif(float x) { return static_cast<float>(__builtin_cos(x * 3.14159265358979323846)); }
inline float normcdff(float x) { return static_cast<float>(0.5 * __builtin_erfc(-x * 0.70710678118654752440)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline float __saturatef(float x) { return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f; }

inline float __expf(float x) { return __builtin_expf(x); }
inline float __exp10f(float x) { return static_cast<float>(__builtin_pow(10.0, x)); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __log10f(float x) { return __builtin_log10f(x); }
inline float __sinf(float x) { return __builtin_sinf(x); }
inline float __cosf(float x) { return __builtin_cosf(x); }
inline float __tanf(float x) { return __builtin_tanf(x); }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline void __sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x), *c = __builtin_cosf(x); }
inline float __tanhf(float x) { return __builtin_tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / __builtin_sqrt(x)); }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

// As CUDA: the smaller and the larger of two numbers of one type, or of what C makes of two. NaN loses.
template <class A, class B>
inline auto min(A a, B b) -> decltype(true ? A() : B()) {
  using T = decltype(true ? A() : B());
  T x = a, y = b;
  return y < x || x != x ? y : x;
}
template <class A, class B>
inline auto max(A a, B b) -> decltype(true ? A() : B()) {
  using T = decltype(true ? A() : B());
  T x = a, y = b;
  return y > x || x != x ? y : x;
}
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }

// To an integer: NaN is 0, what does not fit the nearest that does.
template <class I>
inline I simt_to(double x, I low, I high) {
  return x != x ? 0 : x <= static_cast<double>(low) ? low : x >= static_cast<double>(high) ? high : static_cast<I>(x);
}
#define SIMT_TO(suffix, how)                                                                          \
  inline int __float2int_##suffix(float x) { return simt_to(how(x), -2147483647 - 1, 2147483647); }   \
  inline int __double2int_##suffix(double x) { return simt_to(how(x), -2147483647 - 1, 2147483647); } \
  inline unsigned __float2uint_##suffix(float x) { return simt_to(how(x), 0u, ~0u); }                 \
  inline long long __float2ll_##suffix(float x) { return simt_to(how(x), -0x7fffffffffffffffll - 1, 0x7fffffffffffffffll); }
SIMT_TO(rn, __builtin_rint) SIMT_TO(rz, __builtin_trunc) SIMT_TO(ru, __builtin_ceil) SIMT_TO(rd, __builtin_floor)
#undef SIMT_TO
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}
inline int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
  return c;
}
