// Metal's vectors: float4, packed_float3 and the like, with components by letters in any order (v.xy, v.zyx, v.rgb).
// Every function is put where it is called, so that what a checked build finds is found in the kernel's own line.
#pragma once
#pragma GCC system_header
#include "numbers.h"

#define METAL inline __attribute__((always_inline))

namespace simt {
template <bool, class A, class> struct either { using type = A; };
template <class A, class B> struct either<false, A, B> { using type = B; };
}  // namespace simt

namespace metal {

using simt::half;
using bfloat = simt::bfloat16;

template <class T> struct is_scalar : simt::is_number<T> {};
template <> struct is_scalar<half> { static constexpr bool value = true; };
template <> struct is_scalar<bfloat> { static constexpr bool value = true; };
template <class T> struct scalar : simt::only_if<is_scalar<T>::value, T> {};

template <class T, int N> struct vec;

METAL int inside(int i, int count) {
#ifdef __SANITIZE_THREAD__  // a checked build
  if (i < 0 || i >= count) simt::outside(i, static_cast<uint32_t>(count));
#endif
  (void)count;
  return i;
}

// v.xy: components I... of a vector of N, in its own memory.
template <class T, int N, int... I>
struct Swizzle {
  using value = vec<T, sizeof...(I)>;
  T data[N];
  METAL operator value() const { return value(data[I]...); }
  METAL Swizzle& operator=(const Swizzle& other) { return *this = value(other); }
  METAL Swizzle& operator=(const value& other) {
    int at = 0;
    ((data[I] = other.data[at++]), ...);
    return *this;
  }
};

// All words of two to four of the first letters, as members. (A macro does not expand inside itself: one a level.)
#define METAL_1(M, W, ...) METAL_ONE(W, __VA_ARGS__)
#define METAL_ONE(W, ...) Swizzle<T, room, __VA_ARGS__> W;
#define METAL_A2(M, W, ...) M(W##x, __VA_ARGS__, 0) M(W##y, __VA_ARGS__, 1)
#define METAL_A3(M, W, ...) METAL_A2(M, W, __VA_ARGS__) M(W##z, __VA_ARGS__, 2)
#define METAL_A4(M, W, ...) METAL_A3(M, W, __VA_ARGS__) M(W##w, __VA_ARGS__, 3)
#define METAL_B2(M, W, ...) M(W##x, __VA_ARGS__, 0) M(W##y, __VA_ARGS__, 1)
#define METAL_B3(M, W, ...) METAL_B2(M, W, __VA_ARGS__) M(W##z, __VA_ARGS__, 2)
#define METAL_B4(M, W, ...) METAL_B3(M, W, __VA_ARGS__) M(W##w, __VA_ARGS__, 3)
#define METAL_C2(M, W, ...) M(W##x, __VA_ARGS__, 0) M(W##y, __VA_ARGS__, 1)
#define METAL_C3(M, W, ...) METAL_C2(M, W, __VA_ARGS__) M(W##z, __VA_ARGS__, 2)
#define METAL_C4(M, W, ...) METAL_C3(M, W, __VA_ARGS__) M(W##w, __VA_ARGS__, 3)
#define METAL_THREE2(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_A2(METAL_ONE, W, __VA_ARGS__)
#define METAL_THREE3(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_A3(METAL_ONE, W, __VA_ARGS__)
#define METAL_THREE4(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_A4(METAL_ONE, W, __VA_ARGS__)
#define METAL_TWO2(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_B2(METAL_THREE2, W, __VA_ARGS__)
#define METAL_TWO3(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_B3(METAL_THREE3, W, __VA_ARGS__)
#define METAL_TWO4(W, ...) METAL_ONE(W, __VA_ARGS__) METAL_B4(METAL_THREE4, W, __VA_ARGS__)
#define METAL_FIRST2(W, ...) METAL_C2(METAL_TWO2, W, __VA_ARGS__)
#define METAL_FIRST3(W, ...) METAL_C3(METAL_TWO3, W, __VA_ARGS__)
#define METAL_FIRST4(W, ...) METAL_C4(METAL_TWO4, W, __VA_ARGS__)

template <class T, int N> struct Components;
template <class T>
struct Components<T, 2> {
  static constexpr int room = 2;
  union {
    T data[2];
    struct { T x, y; };
    struct { T r, g; };
    METAL_FIRST2(x, 0) METAL_FIRST2(y, 1)
  };
};
template <class T>
struct Components<T, 3> {
  static constexpr int room = 4;
  union {
    T data[4];
    struct { T x, y, z; };
    struct { T r, g, b; };
    METAL_FIRST3(x, 0) METAL_FIRST3(y, 1) METAL_FIRST3(z, 2)
    METAL_ONE(rg, 0, 1) METAL_ONE(rgb, 0, 1, 2)
  };
};
template <class T>
struct Components<T, 4> {
  static constexpr int room = 4;
  union {
    T data[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    METAL_FIRST4(x, 0) METAL_FIRST4(y, 1) METAL_FIRST4(z, 2) METAL_FIRST4(w, 3)
    METAL_ONE(rg, 0, 1) METAL_ONE(rgb, 0, 1, 2) METAL_ONE(rgba, 0, 1, 2, 3)
  };
};

template <class T, int N> struct PackedComponents;
template <class T> struct PackedComponents<T, 2> { union { T data[2]; struct { T x, y; }; }; };
template <class T> struct PackedComponents<T, 3> { union { T data[3]; struct { T x, y, z; }; }; };
template <class T> struct PackedComponents<T, 4> { union { T data[4]; struct { T x, y, z, w; }; }; };

// As close together as numbers come, without the vector's alignment.
template <class T, int N>
struct packed_vec : PackedComponents<T, N> {
  using PackedComponents<T, N>::data;
  packed_vec() = default;
  METAL packed_vec(const vec<T, N>& v) { *this = v; }
  template <class S, class = typename scalar<S>::type>
  METAL packed_vec(S value) : packed_vec(vec<T, N>(value)) {}
  template <class A, class B, class... Rest>
  METAL packed_vec(A a, B b, Rest... rest) : packed_vec(vec<T, N>(a, b, rest...)) {}
  METAL packed_vec& operator=(const vec<T, N>& v) {
    for (int i = 0; i < N; ++i) data[i] = v.data[i];
    return *this;
  }
  METAL operator vec<T, N>() const {
    vec<T, N> made;
    for (int i = 0; i < N; ++i) made.data[i] = data[i];
    return made;
  }
  METAL T& operator[](int i) { return data[inside(i, N)]; }
  METAL const T& operator[](int i) const { return data[inside(i, N)]; }
};

// vector_of<A>::type: the vector that A is or stands for; none where A is a number or something else.
template <class A> struct vector_of {};
template <class T, int N> struct vector_of<vec<T, N>> { using type = vec<T, N>; };
template <class T, int N> struct vector_of<packed_vec<T, N>> { using type = vec<T, N>; };
template <class T, int N, int... I> struct vector_of<Swizzle<T, N, I...>> { using type = vec<T, sizeof...(I)>; };

// How many components A has: 1 of a number.
template <class A, class = void> struct count { static constexpr int value = is_scalar<A>::value ? 1 : 0; };
template <class A> struct count<A, decltype(void(typename vector_of<A>::type()))> {
  static constexpr int value = vector_of<A>::type::size;
};

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : Components<T, N> {
  using element = T;
  static constexpr int size = N;
  using Components<T, N>::data;
  vec() = default;
  METAL vec(const vec& other) { *this = other; }
  template <class S, class = typename scalar<S>::type>
  METAL vec(S value) {
    const T converted = static_cast<T>(value);
    for (int i = 0; i < N; ++i) data[i] = converted;
  }
  template <class U>
  METAL explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) data[i] = static_cast<T>(other.data[i]);
  }
  template <class U, int M, int... I, class = typename simt::only_if<sizeof...(I) == N, U>::type>
  METAL explicit vec(const Swizzle<U, M, I...>& other) : vec(vec<U, N>(other.operator vec<U, N>())) {}
  template <class U>
  METAL explicit vec(const packed_vec<U, N>& other) {
    for (int i = 0; i < N; ++i) data[i] = static_cast<T>(other.data[i]);
  }
  template <class A, class B, class... Rest,
            class = typename simt::only_if<count<A>::value && count<B>::value &&
                                               count<A>::value + count<B>::value + (0 + ... + count<Rest>::value) == N, A>::type>
  METAL vec(const A& a, const B& b, const Rest&... rest) {
    int at = 0;
    add(at, a), add(at, b), (add(at, rest), ...);
  }
  METAL vec& operator=(const vec& other) {
    for (int i = 0; i < N; ++i) data[i] = other.data[i];
    return *this;
  }
  METAL T& operator[](int i) { return data[inside(i, N)]; }
  METAL const T& operator[](int i) const { return data[inside(i, N)]; }

 private:
  template <class A>
  METAL void add(int& at, const A& a) {
    if constexpr (count<A>::value == 1) {
      data[at++] = static_cast<T>(a);
    } else {
      const typename vector_of<A>::type v(a);
      for (int i = 0; i < v.size; ++i) data[at++] = static_cast<T>(v.data[i]);
    }
  }
};

// joined<A, B, ...>::type: what comes of operands of which one or more are of the same vector, and the others numbers.
struct None;  // no vector yet
struct Wrong;
template <class A, class = void> struct own { using type = typename simt::either<is_scalar<A>::value, None, Wrong>::type; };
template <class A> struct own<A, decltype(void(typename vector_of<A>::type()))> : vector_of<A> {};
template <class V, class W> struct both { using type = Wrong; };
template <class V> struct both<V, V> { using type = V; };
template <class V> struct both<None, V> { using type = V; };
template <class V> struct both<V, None> { using type = V; };
template <> struct both<None, None> { using type = None; };
template <class V, class... A> struct folded { using type = V; };
template <class V, class A, class... Rest>
struct folded<V, A, Rest...> : folded<typename both<V, typename own<A>::type>::type, Rest...> {};
template <class V> struct found { using type = V; };
template <> struct found<None> {};
template <> struct found<Wrong> {};
template <class... A> struct joined : found<typename folded<None, A...>::type> {};

#define METAL_OPERATOR(op)                                                                       \
  template <class A, class B, class V = typename joined<A, B>::type>                             \
  METAL V operator op(const A& a, const B& b) {                                                  \
    const V x(a), y(b);                                                                          \
    V result;                                                                                    \
    for (int i = 0; i < V::size; ++i)                                                            \
      result.data[i] = static_cast<typename V::element>(x.data[i] op y.data[i]);                 \
    return result;                                                                               \
  }                                                                                              \
  template <class T, int N, class B, class V = typename joined<vec<T, N>, B>::type>              \
  METAL vec<T, N>& operator op##=(vec<T, N>& a, const B& b) { return a = a op b; }               \
  template <class T, int N, class B, class V = typename joined<packed_vec<T, N>, B>::type>       \
  METAL packed_vec<T, N>& operator op##=(packed_vec<T, N>& a, const B& b) { return a = a op b; } \
  template <class T, int N, int... I, class B, class V = typename joined<Swizzle<T, N, I...>, B>::type> \
  METAL Swizzle<T, N, I...>& operator op##=(Swizzle<T, N, I...>& a, const B& b) { return a = a op b; }
METAL_OPERATOR(+) METAL_OPERATOR(-) METAL_OPERATOR(*) METAL_OPERATOR(/) METAL_OPERATOR(%)
METAL_OPERATOR(&) METAL_OPERATOR(|) METAL_OPERATOR(^) METAL_OPERATOR(<<) METAL_OPERATOR(>>)
#undef METAL_OPERATOR
#define METAL_COMPARE(op)                                                                        \
  template <class A, class B, class V = typename joined<A, B>::type>                             \
  METAL vec<bool, V::size> operator op(const A& a, const B& b) {                                 \
    const V x(a), y(b);                                                                          \
    vec<bool, V::size> result;                                                                   \
    for (int i = 0; i < V::size; ++i) result.data[i] = x.data[i] op y.data[i];                   \
    return result;                                                                               \
  }
METAL_COMPARE(==) METAL_COMPARE(!=) METAL_COMPARE(<) METAL_COMPARE(>) METAL_COMPARE(<=) METAL_COMPARE(>=)
METAL_COMPARE(&&) METAL_COMPARE(||)
#undef METAL_COMPARE
#define METAL_PREFIX(op)                                                                         \
  template <class A, class V = typename vector_of<A>::type>                                      \
  METAL V operator op(const A& a) {                                                              \
    const V x(a);                                                                                \
    V result;                                                                                    \
    for (int i = 0; i < V::size; ++i) result.data[i] = static_cast<typename V::element>(op x.data[i]); \
    return result;                                                                               \
  }
METAL_PREFIX(-) METAL_PREFIX(+) METAL_PREFIX(~) METAL_PREFIX(!)
#undef METAL_PREFIX

// Bits of one type as another's of the same size.
template <class To, class From, class = typename simt::only_if<sizeof(To) == sizeof(From), To>::type>
METAL To as_type(const From& from) {
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

}  // namespace metal

// A half beside a whole number is a half, as in Metal; simt's own are floats then.
namespace simt {
template <class T> struct is_integer : is_number<T> {};
template <> struct is_integer<float> { static constexpr bool value = false; };
template <> struct is_integer<double> { static constexpr bool value = false; };
#define METAL_MIXED_HALF(op)                                                                     \
  template <uint16_t (*F)(float), float (*T)(uint16_t), class I, class = typename only_if<is_integer<I>::value, I>::type> \
  METAL Float16<F, T> operator op(Float16<F, T> a, I b) { return a op Float16<F, T>(b); }        \
  template <uint16_t (*F)(float), float (*T)(uint16_t), class I, class = typename only_if<is_integer<I>::value, I>::type> \
  METAL Float16<F, T> operator op(I a, Float16<F, T> b) { return Float16<F, T>(a) op b; }
METAL_MIXED_HALF(+) METAL_MIXED_HALF(-) METAL_MIXED_HALF(*) METAL_MIXED_HALF(/)
#undef METAL_MIXED_HALF
}  // namespace simt

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef decltype(sizeof(0)) size_t;
typedef decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr)) ptrdiff_t;
using metal::bfloat;
using metal::half;
#define METAL_NAMES(T)                                                                           \
  using T##2 = metal::vec<T, 2>;                                                                 \
  using T##3 = metal::vec<T, 3>;                                                                 \
  using T##4 = metal::vec<T, 4>;                                                                 \
  using packed_##T##2 = metal::packed_vec<T, 2>;                                                 \
  using packed_##T##3 = metal::packed_vec<T, 3>;                                                 \
  using packed_##T##4 = metal::packed_vec<T, 4>;                                                 \
  namespace metal {                                                                              \
  using ::T##2, ::T##3, ::T##4, ::packed_##T##2, ::packed_##T##3, ::packed_##T##4;               \
  }
METAL_NAMES(bool) METAL_NAMES(char) METAL_NAMES(uchar) METAL_NAMES(short) METAL_NAMES(ushort) METAL_NAMES(int)
METAL_NAMES(uint) METAL_NAMES(long) METAL_NAMES(ulong) METAL_NAMES(half) METAL_NAMES(bfloat) METAL_NAMES(float)
#undef METAL_NAMES
namespace metal {
using ::uchar, ::ushort, ::uint, ::ulong, ::size_t, ::ptrdiff_t;
using ::int8_t, ::uint8_t, ::int16_t, ::uint16_t, ::int32_t, ::uint32_t, ::int64_t, ::uint64_t;
}  // namespace metal
METAL half operator""h(long double value) { return static_cast<float>(value); }
METAL half operator""h(unsigned long long value) { return value; }
METAL bfloat operator""bf(long double value) { return static_cast<float>(value); }
