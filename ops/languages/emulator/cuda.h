// CUDA C++ spelled over simt.h: qualifiers, indices, barriers, warps, atomics, vectors. Names and meanings as NVIDIA's
// CUDA C++ Programming Guide and Math API have them; what is not here is a compile error.
#pragma once
#include <math.h>

#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __shared__ SIMT_SHARED
#define __restrict__ __restrict
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __inline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 800
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_PI_F 3.141592654f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef long long longlong;
typedef unsigned long long ulonglong;
typedef decltype(sizeof(0)) size_t;

// float2, make_float2 and the like; `A`: alignment of 2 and of 4. Three stand as close as one.
#define SIMT_VECTORS(T, N, A2, A4)                                                                   \
  struct N##1 { T x; };                                                                              \
  struct alignas(A2) N##2 { T x, y; };                                                               \
  struct N##3 { T x, y, z; };                                                                        \
  struct alignas(A4) N##4 { T x, y, z, w; };                                                         \
  inline N##1 make_##N##1(T x) { return {x}; }                                                       \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                               \
  inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }                                       \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(signed char, char, 2, 4)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(long long, longlong, 16, 16)
SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
#undef SIMT_VECTORS
using uint3 = simt::Index;  // threadIdx is one
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint1 make_uint1(unsigned x) { return {x}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define threadIdx (simt::here.thread)
#define blockIdx (simt::here.block)
#define blockDim (simt::here.block_size)
#define gridDim (simt::here.grid)
constexpr int warpSize = 32;

inline void __syncthreads(SIMT_SITE) { simt::barrier("__syncthreads()", file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) {
  return static_cast<int>(simt::barrier_count(p != 0, "__syncthreads_count()", file, line));
}
inline int __syncthreads_or(int p, SIMT_SITE) {
  return simt::barrier_count(p != 0, "__syncthreads_or()", file, line) != 0;
}
inline int __syncthreads_and(int p, SIMT_SITE) {
  return simt::barrier_count(p == 0, "__syncthreads_and()", file, line) == 0;
}
inline void __syncwarp(unsigned mask = simt::all_lanes, SIMT_SITE) {
  simt::warp_barrier(mask, "__syncwarp()", file, line);
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }
inline void __threadfence_block() {}
inline unsigned __activemask() { return simt::live_lanes(); }
inline void __trap(SIMT_SITE) { simt::fail("__trap()", file, line); }
inline void __assert(const char* what, const char* file, int line) { simt::fail(what, file, line); }
#undef assert
#define assert(condition) ((condition) ? (void)0 : __assert("assertion failed: " #condition, __FILE__, __LINE__))
extern "C" int printf(const char*, ...);

// Shuffles stay within groups of `width` lanes; a lane that would read outside gets its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_SITE) {
  unsigned first = simt::lane() & ~(width - 1u);
  return simt::shuffle(mask, v, first | (source & (width - 1u)), "__shfl_sync()", file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  unsigned lane = simt::lane(), within = lane & (width - 1u);
  return simt::shuffle(mask, v, delta > within ? lane : lane - delta, "__shfl_up_sync()", file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  unsigned lane = simt::lane(), within = lane & (width - 1u);
  bool inside = delta < static_cast<unsigned>(width) - within;
  return simt::shuffle(mask, v, inside ? lane + delta : lane, "__shfl_down_sync()", file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, SIMT_SITE) {
  unsigned lane = simt::lane(), other = lane ^ bits;
  bool inside = other < 32 && (other & ~(width - 1u)) <= (lane & ~(width - 1u));  // a higher group is not read
  return simt::shuffle(mask, v, inside ? other : lane, "__shfl_xor_sync()", file, line);
}

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::ballot(mask, p != 0, "__ballot_sync()", file, line);
}
inline int __any_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::ballot(mask, p != 0, "__any_sync()", file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::ballot(mask, p == 0, "__all_sync()", file, line) == 0;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v, SIMT_SITE) {
  unsigned came, same = 0;
  const uint64_t own = simt::bits_as<uint64_t>(v);
  const uint64_t* all = simt::gather(mask, own, &came, "__match_any_sync()", file, line);
  for (unsigned i = 0; i < 32; ++i) same |= static_cast<unsigned>((came >> i & 1) && all[i] == own) << i;
  return same;
}
#define SIMT_REDUCE(name, T, expression)                                                                         \
  inline T __reduce_##name##_sync(unsigned mask, T v, SIMT_SITE) {                                               \
    return simt::reduce(mask, v, [](T a, T b) { return static_cast<T>(expression); }, "__reduce_" #name "_sync()", \
                        file, line);                                                                             \
  }
SIMT_REDUCE(add, int, static_cast<unsigned>(a) + static_cast<unsigned>(b)) SIMT_REDUCE(add, unsigned, a + b)
SIMT_REDUCE(min, int, a < b ? a : b) SIMT_REDUCE(min, unsigned, a < b ? a : b)
SIMT_REDUCE(max, int, a > b ? a : b) SIMT_REDUCE(max, unsigned, a > b ? a : b)
SIMT_REDUCE(and, unsigned, a & b) SIMT_REDUCE(or, unsigned, a | b) SIMT_REDUCE(xor, unsigned, a ^ b)
#undef SIMT_REDUCE

// Atomics: CUDA has them for these types, and for no other.
template <class T> struct simt_same { using type = T; };  // keeps the value from taking part in finding T
#define SIMT_ATOMIC(name, expression)                                                                      \
  template <class T>                                                                                       \
  inline T atomic##name(T* p, typename simt_same<T>::type v) {                                  \
    static_assert(sizeof(T) >= 2, "no atomic operation takes this type");                                  \
    return simt::atomic(p, [v](T old) { return static_cast<T>(expression); });                 \
  }
SIMT_ATOMIC(Add, old + v) SIMT_ATOMIC(Sub, old - v) SIMT_ATOMIC(Exch, v)
SIMT_ATOMIC(Min, old < v ? old : v) SIMT_ATOMIC(Max, old > v ? old : v)
SIMT_ATOMIC(And, old & v) SIMT_ATOMIC(Or, old | v) SIMT_ATOMIC(Xor, old ^ v)
#undef SIMT_ATOMIC
inline unsigned atomicInc(unsigned* p, unsigned v) {
  return simt::atomic(p, [v](unsigned old) { return old >= v ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned v) {
  return simt::atomic(p, [v](unsigned old) { return old == 0 || old > v ? v : old - 1; });
}
template <class T>
inline T atomicCAS(T* p, typename simt_same<T>::type expected, typename simt_same<T>::type v) {
  return simt::atomic(p, [expected, v](T old) { return old == expected ? v : old; });
}

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, typename simt_same<T>::type v) { *p = v; }
template <class T> inline void __stcs(T* p, typename simt_same<T>::type v) { *p = v; }
template <class T> inline void __stwt(T* p, typename simt_same<T>::type v) { *p = v; }

#include "cuda_math.h"
#include "cuda_half.h"
#include "include/cuda/std/cstdint"
#include "include/cuda/std/type_traits"

#define SIMT_ALSO using ::min; using ::max;  // a text's own, such as TVM's of half, stand beside these
#define alignas(n) __attribute__((aligned(n)))  // CUDA takes it anywhere among the words of a declaration
