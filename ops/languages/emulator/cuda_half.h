// CUDA's half and bfloat16: names of cuda_fp16.h and cuda_bf16.h over simt's numbers. A function is made for both.
#pragma once
#include "cuda.h"

using half = simt::half;
using __half = simt::half;
using nv_bfloat16 = simt::bfloat16;
using __nv_bfloat16 = simt::bfloat16;
struct alignas(4) half2 {
  half x, y;
  half2() = default;
  half2(half x, half y) : x(x), y(y) {}
};
struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
using __half2 = half2;
using __nv_bfloat162 = nv_bfloat162;
inline half2 make_half2(half x, half y) { return {x, y}; }
inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }

inline float __half2float(half a) { return a; }
inline half __float2half(float a) { return a; }
inline half __float2half_rn(float a) { return a; }
inline half __double2half(double a) { return static_cast<float>(a); }
inline half __int2half_rn(int a) { return static_cast<float>(a); }
inline int __half2int_rn(half a) { return __float2int_rn(a); }
inline int __half2int_rz(half a) { return __float2int_rz(a); }
inline unsigned short __half_as_ushort(half a) { return a.bits; }
inline short __half_as_short(half a) { return static_cast<short>(a.bits); }
inline half __ushort_as_half(unsigned short a) { return half::of_bits(a); }
inline half __short_as_half(short a) { return half::of_bits(static_cast<uint16_t>(a)); }
inline half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline half2 __float2half2_rn(float a) { return {a, a}; }
inline half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline float2 __half22float2(half2 a) { return {a.x, a.y}; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 __half2half2(half a) { return {a, a}; }
inline half __low2half(half2 a) { return a.x; }
inline half __high2half(half2 a) { return a.y; }
inline half2 __low2half2(half2 a) { return {a.x, a.x}; }
inline half2 __high2half2(half2 a) { return {a.y, a.y}; }
inline half2 __lowhigh2highlow(half2 a) { return {a.y, a.x}; }

inline float __bfloat162float(nv_bfloat16 a) { return a; }
inline nv_bfloat16 __float2bfloat16(float a) { return a; }
inline nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline nv_bfloat16 __double2bfloat16(double a) { return static_cast<float>(a); }
inline nv_bfloat16 __int2bfloat16_rn(int a) { return static_cast<float>(a); }
inline int __bfloat162int_rn(nv_bfloat16 a) { return __float2int_rn(a); }
inline unsigned short __bfloat16_as_ushort(nv_bfloat16 a) { return a.bits; }
inline nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return nv_bfloat16::of_bits(a); }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(nv_bfloat162 a) { return {a.x, a.y}; }
inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
inline nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 a) { return {a, a}; }
inline nv_bfloat16 __low2bfloat16(nv_bfloat162 a) { return a.x; }
inline nv_bfloat16 __high2bfloat16(nv_bfloat162 a) { return a.y; }

#define SIMT_UNARY(T, T2, one, two, expression)                     \
  inline T one(T a) { return T(expression); }                       \
  inline T2 two(T2 a) { return {one(a.x), one(a.y)}; }
#define SIMT_BINARY(T, T2, one, two, expression)                    \
  inline T one(T a, T b) { return T(expression); }                  \
  inline T2 two(T2 a, T2 b) { return {one(a.x, b.x), one(a.y, b.y)}; }
#define SIMT_COMPARE(T, T2, name, op)                               \
  inline bool __h##name(T a, T b) { return a op b; }                \
  inline T2 __h##name##2(T2 a, T2 b) { return {T(a.x op b.x), T(a.y op b.y)}; }
#define SIMT_BOTH(T, T2, low, high)                                                                        \
  SIMT_BINARY(T, T2, __hadd, __hadd2, a + b)                                                               \
  SIMT_BINARY(T, T2, __hsub, __hsub2, a - b)                                                               \
  SIMT_BINARY(T, T2, __hmul, __hmul2, a * b)                                                               \
  SIMT_BINARY(T, T2, __hdiv, __h2div, a / b)                                                               \
  SIMT_BINARY(T, T2, __hmax, __hmax2, __builtin_fmaxf(a, b))                                               \
  SIMT_BINARY(T, T2, __hmin, __hmin2, __builtin_fminf(a, b))                                               \
  SIMT_UNARY(T, T2, __hneg, __hneg2, -a)                                                                   \
  SIMT_UNARY(T, T2, __habs, __habs2, __builtin_fabsf(a))                                                   \
  SIMT_UNARY(T, T2, hexp, h2exp, __builtin_expf(a))                                                        \
  SIMT_UNARY(T, T2, hexp2, h2exp2, __builtin_exp2f(a))                                                     \
  SIMT_UNARY(T, T2, hlog, h2log, __builtin_logf(a))                                                        \
  SIMT_UNARY(T, T2, hlog2, h2log2, __builtin_log2f(a))                                                     \
  SIMT_UNARY(T, T2, hsqrt, h2sqrt, __builtin_sqrtf(a))                                                     \
  SIMT_UNARY(T, T2, hrsqrt, h2rsqrt, 1.0f / __builtin_sqrtf(a))                                            \
  SIMT_UNARY(T, T2, hrcp, h2rcp, 1.0f / a)                                                                 \
  SIMT_UNARY(T, T2, hsin, h2sin, __builtin_sinf(a))                                                        \
  SIMT_UNARY(T, T2, hcos, h2cos, __builtin_cosf(a))                                                        \
  SIMT_UNARY(T, T2, htanh, h2tanh, __builtin_tanhf(a))                                                     \
  SIMT_UNARY(T, T2, hfloor, h2floor, __builtin_floorf(a))                                                  \
  SIMT_UNARY(T, T2, hceil, h2ceil, __builtin_ceilf(a))                                                     \
  SIMT_UNARY(T, T2, hrint, h2rint, __builtin_rintf(a))                                                     \
  SIMT_UNARY(T, T2, htrunc, h2trunc, __builtin_truncf(a))                                                  \
  SIMT_COMPARE(T, T2, eq, ==)                                                                              \
  SIMT_COMPARE(T, T2, ne, !=)                                                                              \
  SIMT_COMPARE(T, T2, lt, <)                                                                               \
  SIMT_COMPARE(T, T2, gt, >)                                                                               \
  SIMT_COMPARE(T, T2, le, <=)                                                                              \
  SIMT_COMPARE(T, T2, ge, >=)                                                                              \
  inline bool __hisnan(T a) { return a != a; }                                                             \
  inline T __hfma(T a, T b, T c) { return simt::fused(a, b, c); }                                          \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }           \
  inline float low(T2 a) { return a.x; }                                                                   \
  inline float high(T2 a) { return a.y; }                                                                  \
  inline T2 operator+(T2 a, T2 b) { return __hadd2(a, b); }                                                \
  inline T2 operator-(T2 a, T2 b) { return __hsub2(a, b); }                                                \
  inline T2 operator*(T2 a, T2 b) { return __hmul2(a, b); }                                                \
  inline T2 operator/(T2 a, T2 b) { return __h2div(a, b); }                                                \
  inline T2 operator-(T2 a) { return __hneg2(a); }                                                         \
  inline T2& operator+=(T2& a, T2 b) { return a = a + b; }                                                 \
  inline T2& operator-=(T2& a, T2 b) { return a = a - b; }                                                 \
  inline T2& operator*=(T2& a, T2 b) { return a = a * b; }
SIMT_BOTH(half, half2, __low2float, __high2float)
SIMT_BOTH(nv_bfloat16, nv_bfloat162, __low2float, __high2float)
#undef SIMT_UNARY
#undef SIMT_BINARY
#undef SIMT_COMPARE
#undef SIMT_BOTH
