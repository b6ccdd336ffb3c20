// Metal's functions of numbers and vectors: common, math, relational, geometric, integer. Names and meanings as the
// Metal Shading Language Specification has them. fast:: and precise:: are as exact as the others here.
#pragma once
#pragma GCC system_header
#include "metal_vectors.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX (metal::half(65504.0f))
#define HALF_MIN (metal::half(0x1p-14f))
#define HALF_EPSILON (metal::half(0x1p-10f))
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX 0xffffffffu
#define CHAR_MAX 127
#define CHAR_MIN -128
#define UCHAR_MAX 255
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f

namespace metal {

namespace fast = metal;
namespace precise = metal;

// What a function does to numbers, it does to the components of vectors, one by one.
#define METAL_EACH(name)                                                                               \
  template <class A, class V = typename vector_of<A>::type>                                            \
  METAL auto name(const A& a) {                                                                        \
    const V x(a);                                                                                      \
    vec<decltype(name(x.data[0])), V::size> result;                                                    \
    for (int i = 0; i < V::size; ++i) result.data[i] = name(x.data[i]);                                \
    return result;                                                                                     \
  }
#define METAL_EACH2(name)                                                                              \
  template <class A, class B, class V = typename joined<A, B>::type>                                   \
  METAL V name(const A& a, const B& b) {                                                               \
    const V x(a), y(b);                                                                                \
    V result;                                                                                          \
    for (int i = 0; i < V::size; ++i) result.data[i] = name(x.data[i], y.data[i]);                     \
    return result;                                                                                     \
  }
#define METAL_EACH3(name)                                                                              \
  template <class A, class B, class C, class V = typename joined<A, B, C>::type>                       \
  METAL V name(const A& a, const B& b, const C& c) {                                                   \
    const V x(a), y(b), z(c);                                                                          \
    V result;                                                                                          \
    for (int i = 0; i < V::size; ++i) result.data[i] = name(x.data[i], y.data[i], z.data[i]);          \
    return result;                                                                                     \
  }
// Functions of floats: computed in float32, then rounded to the type.
#define METAL_FLOAT1(name, expression)                                                                 \
  METAL float name(float x) { return static_cast<float>(expression); }                                 \
  METAL half name(half h) { const float x = h; return static_cast<float>(expression); }                \
  METAL bfloat name(bfloat h) { const float x = h; return static_cast<float>(expression); }            \
  METAL_EACH(name)
#define METAL_FLOAT2(name, expression)                                                                 \
  METAL float name(float x, float y) { return expression; }                                            \
  METAL half name(half h, half k) { const float x = h, y = k; return expression; }                     \
  METAL bfloat name(bfloat h, bfloat k) { const float x = h, y = k; return expression; }               \
  METAL_EACH2(name)
#define METAL_FLOAT3(name, expression)                                                                 \
  METAL float name(float x, float y, float z) { return expression; }                                   \
  METAL half name(half h, half k, half l) { const float x = h, y = k, z = l; return expression; }      \
  METAL bfloat name(bfloat h, bfloat k, bfloat l) { const float x = h, y = k, z = l; return expression; } \
  METAL_EACH3(name)
#define METAL_INTEGERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)

constexpr double pi = 3.14159265358979323846L;  // L: other constants of a text are floats
METAL_FLOAT1(exp, __builtin_expf(x)) METAL_FLOAT1(exp2, __builtin_exp2f(x))
METAL_FLOAT1(exp10, __builtin_pow(10.0, static_cast<double>(x)))
METAL_FLOAT1(log, __builtin_logf(x)) METAL_FLOAT1(log2, __builtin_log2f(x)) METAL_FLOAT1(log10, __builtin_log10f(x))
METAL_FLOAT1(sqrt, __builtin_sqrtf(x)) METAL_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
METAL_FLOAT1(sin, __builtin_sinf(x)) METAL_FLOAT1(cos, __builtin_cosf(x)) METAL_FLOAT1(tan, __builtin_tanf(x))
METAL_FLOAT1(sinpi, __builtin_sin(x * pi)) METAL_FLOAT1(cospi, __builtin_cos(x * pi)) METAL_FLOAT1(tanpi, __builtin_tan(x * pi))
METAL_FLOAT1(asin, __builtin_asinf(x)) METAL_FLOAT1(acos, __builtin_acosf(x)) METAL_FLOAT1(atan, __builtin_atanf(x))
METAL_FLOAT1(sinh, __builtin_sinhf(x)) METAL_FLOAT1(cosh, __builtin_coshf(x)) METAL_FLOAT1(tanh, __builtin_tanhf(x))
METAL_FLOAT1(asinh, __builtin_asinhf(x)) METAL_FLOAT1(acosh, __builtin_acoshf(x)) METAL_FLOAT1(atanh, __builtin_atanhf(x))
METAL_FLOAT1(floor, __builtin_floorf(x)) METAL_FLOAT1(ceil, __builtin_ceilf(x)) METAL_FLOAT1(trunc, __builtin_truncf(x))
METAL_FLOAT1(round, __builtin_roundf(x)) METAL_FLOAT1(rint, __builtin_rintf(x)) METAL_FLOAT1(fabs, __builtin_fabsf(x))
METAL_FLOAT1(sign, x > 0 ? 1 : x < 0 ? -1 : x == x ? x : 0)
METAL_FLOAT1(saturate, x > 0 ? x < 1 ? x : 1.0f : 0.0f)
METAL_FLOAT1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
METAL_FLOAT2(pow, __builtin_powf(x, y)) METAL_FLOAT2(powr, __builtin_powf(x, y)) METAL_FLOAT2(atan2, __builtin_atan2f(x, y))
METAL_FLOAT2(fmod, __builtin_fmodf(x, y)) METAL_FLOAT2(fdim, __builtin_fdimf(x, y)) METAL_FLOAT2(divide, x / y)
METAL_FLOAT2(copysign, __builtin_copysignf(x, y)) METAL_FLOAT2(step, y < x ? 0.0f : 1.0f)
METAL_FLOAT2(fmin, __builtin_fminf(x, y)) METAL_FLOAT2(fmax, __builtin_fmaxf(x, y))
METAL_FLOAT3(mix, x + (y - x) * z)

METAL float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
METAL half fma(half x, half y, half z) { return simt::fused(x, y, z); }
METAL bfloat fma(bfloat x, bfloat y, bfloat z) { return simt::fused(x, y, z); }
METAL_EACH3(fma)
METAL float smoothstep(float low, float high, float x) {
  const float t = saturate((x - low) / (high - low));
  return t * t * (3 - 2 * t);
}
METAL half smoothstep(half low, half high, half x) { return smoothstep(float(low), float(high), float(x)); }
METAL_EACH3(smoothstep)

// The smaller and the larger: of two floats of which one is NaN, the other.
METAL float min(float x, float y) { return __builtin_fminf(x, y); }
METAL float max(float x, float y) { return __builtin_fmaxf(x, y); }
METAL half min(half x, half y) { return __builtin_fminf(x, y); }
METAL half max(half x, half y) { return __builtin_fmaxf(x, y); }
METAL bfloat min(bfloat x, bfloat y) { return __builtin_fminf(x, y); }
METAL bfloat max(bfloat x, bfloat y) { return __builtin_fmaxf(x, y); }
METAL float abs(float x) { return __builtin_fabsf(x); }
METAL half abs(half x) { return __builtin_fabsf(x); }
METAL bfloat abs(bfloat x) { return __builtin_fabsf(x); }
#define METAL_INTEGER(T)                                                                               \
  METAL T min(T x, T y) { return y < x ? y : x; }                                                      \
  METAL T max(T x, T y) { return x < y ? y : x; }                                                      \
  METAL T abs(T x) { return static_cast<T>(x < T(0) ? T(0) - x : x); }                                 \
  METAL T absdiff(T x, T y) { return static_cast<T>(x < y ? y - x : x - y); }                          \
  METAL T popcount(T x) { return static_cast<T>(__builtin_popcountll(static_cast<ulong>(x) & (~0ul >> (64 - 8 * sizeof(T))))); } \
  METAL T clz(T x) {                                                                                   \
    const ulong bits = static_cast<ulong>(x) & (~0ul >> (64 - 8 * sizeof(T)));                         \
    return static_cast<T>(bits ? __builtin_clzll(bits) - (64 - 8 * sizeof(T)) : 8 * sizeof(T));        \
  }                                                                                                    \
  METAL T ctz(T x) { return static_cast<T>(x ? __builtin_ctzll(static_cast<ulong>(x)) : 8 * sizeof(T)); } \
  METAL T rotate(T x, T by) {                                                                          \
    const ulong width = 8 * sizeof(T), bits = static_cast<ulong>(x) & (~0ul >> (64 - width)), n = static_cast<ulong>(by) % width; \
    return static_cast<T>(n ? bits << n | bits >> (width - n) : bits);                                 \
  }
METAL_INTEGERS(METAL_INTEGER)
#undef METAL_INTEGER
METAL_EACH2(min) METAL_EACH2(max) METAL_EACH2(absdiff) METAL_EACH2(rotate)
METAL_EACH(abs) METAL_EACH(popcount) METAL_EACH(clz) METAL_EACH(ctz)
#define METAL_CLAMP(T)                                                                                 \
  METAL T clamp(T x, T low, T high) { return min(max(x, low), high); }                                 \
  METAL T min3(T x, T y, T z) { return min(x, min(y, z)); }                                            \
  METAL T max3(T x, T y, T z) { return max(x, max(y, z)); }                                            \
  METAL T median3(T x, T y, T z) { return max(min(x, y), min(max(x, y), z)); }                         \
  METAL T select(T x, T y, bool second) { return second ? y : x; }
METAL_INTEGERS(METAL_CLAMP) METAL_CLAMP(float) METAL_CLAMP(half) METAL_CLAMP(bfloat)
#undef METAL_CLAMP
METAL_EACH3(clamp) METAL_EACH3(min3) METAL_EACH3(max3) METAL_EACH3(median3)
METAL int mul24(int x, int y) { return (x << 8 >> 8) * (y << 8 >> 8); }
METAL uint mul24(uint x, uint y) { return (x & 0xffffff) * (y & 0xffffff); }
METAL int mad24(int x, int y, int z) { return mul24(x, y) + z; }
METAL uint mad24(uint x, uint y, uint z) { return mul24(x, y) + z; }
METAL int mulhi(int x, int y) { return static_cast<int>(static_cast<long>(x) * y >> 32); }
METAL uint mulhi(uint x, uint y) { return static_cast<uint>(static_cast<ulong>(x) * y >> 32); }
METAL uint reverse_bits(uint x) {
  uint made = 0;
  for (int i = 0; i < 32; ++i) made |= (x >> i & 1u) << (31 - i);
  return made;
}
METAL uint extract_bits(uint x, uint offset, uint bits) { return bits ? x >> offset & ~0u >> (32 - bits) : 0; }
METAL int extract_bits(int x, uint offset, uint bits) {
  return bits ? static_cast<int>(static_cast<uint>(x) << (32 - offset - bits)) >> (32 - bits) : 0;
}

// select(a, b, c): b where c is true. Of vectors, component by component.
template <class A, class B, class C, class V = typename joined<A, B>::type, class W = typename vector_of<C>::type>
METAL V select(const A& a, const B& b, const C& c) {
  const V x(a), y(b);
  const W which(c);
  V result;
  for (int i = 0; i < V::size; ++i) result.data[i] = which.data[i] ? y.data[i] : x.data[i];
  return result;
}
#define METAL_ASK(name, expression)                                                                    \
  METAL bool name(float x) { return expression; }                                                      \
  METAL bool name(half h) { const float x = h; return expression; }                                    \
  METAL bool name(bfloat h) { const float x = h; return expression; }                                  \
  METAL_EACH(name)
METAL_ASK(isnan, x != x) METAL_ASK(isinf, __builtin_fabsf(x) == INFINITY) METAL_ASK(isfinite, x - x == 0)
METAL_ASK(signbit, __builtin_signbit(x) != 0)
#undef METAL_ASK
template <int N>
METAL bool any(vec<bool, N> v) {
  bool result = false;
  for (int i = 0; i < N; ++i) result = result || v.data[i];
  return result;
}
template <int N>
METAL bool all(vec<bool, N> v) {
  bool result = true;
  for (int i = 0; i < N; ++i) result = result && v.data[i];
  return result;
}
METAL bool any(bool x) { return x; }
METAL bool all(bool x) { return x; }

METAL float sincos(float x, float& c) { return c = __builtin_cosf(x), __builtin_sinf(x); }
METAL half sincos(half x, half& c) { return c = cos(x), sin(x); }
METAL float modf(float x, float& whole) { return whole = trunc(x), copysign(x - x == 0 ? x - whole : 0.0f, x); }
METAL float frexp(float x, int& exponent) { return __builtin_frexpf(x, &exponent); }
METAL float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
METAL half ldexp(half x, int exponent) { return __builtin_ldexpf(x, exponent); }
METAL int ilogb(float x) { return __builtin_ilogbf(x); }
METAL float nextafter(float x, float y) { return __builtin_nextafterf(x, y); }

// Sums of products are added from the first component to the last, in the vectors' own type.
template <class A, class B, class V = typename joined<A, B>::type>
METAL typename V::element dot(const A& a, const B& b) {
  const V x(a), y(b);
  typename V::element sum = x.data[0] * y.data[0];
  for (int i = 1; i < V::size; ++i) sum += x.data[i] * y.data[i];
  return sum;
}
template <class A, class V = typename vector_of<A>::type> METAL auto length_squared(const A& a) { return dot(a, a); }
template <class A, class V = typename vector_of<A>::type> METAL auto length(const A& a) { return sqrt(dot(a, a)); }
template <class A, class V = typename vector_of<A>::type> METAL V normalize(const A& a) { return a * rsqrt(dot(a, a)); }
template <class A, class B, class V = typename joined<A, B>::type>
METAL auto distance(const A& a, const B& b) { return length(a - b); }
template <class A, class B, class V = typename joined<A, B>::type>
METAL auto distance_squared(const A& a, const B& b) { return length_squared(a - b); }
template <class A, class B, class V = typename joined<A, B>::type>
METAL V cross(const A& a, const B& b) {
  const V x(a), y(b);
  return V(x.yzx) * V(y.zxy) - V(x.zxy) * V(y.yzx);
}

template <class T> struct numeric_limits;
#define METAL_LIMITS(T, LOWEST, LOW, HIGH, STEP)                                                       \
  template <> struct numeric_limits<T> {                                                               \
    static METAL T lowest() { return LOWEST; }                                                         \
    static METAL T min() { return LOW; }                                                               \
    static METAL T max() { return HIGH; }                                                              \
    static METAL T epsilon() { return STEP; }                                                          \
    static METAL T infinity() { return INFINITY; }                                                     \
    static METAL T quiet_NaN() { return NAN; }                                                         \
  };
METAL_LIMITS(float, -FLT_MAX, FLT_MIN, FLT_MAX, FLT_EPSILON)
METAL_LIMITS(half, -65504.0f, 0x1p-14f, 65504.0f, 0x1p-10f)
METAL_LIMITS(bfloat, -0x1.fep127f, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
#undef METAL_LIMITS
#define METAL_LIMITS(T)                                                                                \
  template <> struct numeric_limits<T> {                                                               \
    static constexpr METAL T max() {                                                                   \
      return static_cast<T>(T(-1) < T(0) ? ~0ul >> (65 - 8 * sizeof(T)) : ~0ul >> (64 - 8 * sizeof(T))); \
    }                                                                                                  \
    static constexpr METAL T min() { return static_cast<T>(T(-1) < T(0) ? -max() - 1 : 0); }           \
    static constexpr METAL T lowest() { return min(); }                                                \
  };
METAL_INTEGERS(METAL_LIMITS)
#undef METAL_LIMITS

}  // namespace metal
