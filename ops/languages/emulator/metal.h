// The Metal Shading Language spelled over simt.h: address spaces, barriers, simdgroups, atomics; vectors and functions
// are in metal_vectors.h and metal_math.h. What is not here is a compile error.
#pragma once
#pragma GCC system_header
#include "metal_math.h"

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
METAL constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
enum memory_order { memory_order_relaxed, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

METAL void threadgroup_barrier(mem_flags, SIMT_SITE) { simt::barrier("threadgroup_barrier()", file, line); }
METAL void simdgroup_barrier(mem_flags, SIMT_SITE) {
  simt::warp_barrier(simt::all_lanes, "simdgroup_barrier()", file, line);
}
METAL void atomic_thread_fence(mem_flags flags, memory_order, thread_scope = thread_scope_device) {
  if (static_cast<uint>(flags) & static_cast<uint>(mem_flags::mem_device)) simt::fence();
}

// What the launch says, for parameters such as [[thread_position_in_grid]].
struct Positions {
  static METAL uint3 of(simt::Index i) { return uint3(i.x, i.y, i.z); }
  static METAL uint3 thread_in_group() { return of(simt::here.thread); }
  static METAL uint3 group() { return of(simt::here.block); }
  static METAL uint simdgroups() { return (threads() + simt::warp_size - 1) / simt::warp_size; }
  static METAL uint threads() { return product(simt::here.block_size); }
  static METAL uint product(simt::Index i) { return i.x * i.y * i.z; }
  static METAL uint3 thread_in_grid() { return of(simt::here.block) * of(simt::here.block_size) + of(simt::here.thread); }
  static METAL uint3 grid_threads() { return of(simt::here.grid) * of(simt::here.block_size); }
};
// A position as a parameter of type T takes it: a number is the first of three.
template <class T>
METAL T positioned(uint3 at) {
  if constexpr (count<T>::value == 1) return static_cast<T>(at.x);
  else if constexpr (count<T>::value == 2) return T(at.x, at.y);
  else return T(at);
}

// The bits of a lane that is there; ones, which are no number, of a lane that is not.
template <class T>
METAL T of_lane(uint32_t mask, T value, uint32_t from, const char* name, const char* file, int line) {
  T result;
  for (uint32_t at = 0; at < sizeof(T); at += 8) {
    const uint32_t size = sizeof(T) - at < 8 ? sizeof(T) - at : 8;
    uint64_t bits = 0;
    uint32_t came;
    __builtin_memcpy(&bits, reinterpret_cast<const char*>(&value) + at, size);
    const uint64_t* all = simt::gather(mask, bits, &came, name, file, line);
    bits = from < simt::warp_size && came >> from & 1 ? all[from] : ~uint64_t{0};
    __builtin_memcpy(reinterpret_cast<char*>(&result) + at, &bits, size);
  }
  return result;
}
METAL uint32_t quad() { return 0xfu << (simt::lane() & ~3u); }

// Shuffles of a simdgroup (S: its 32 lanes) and of a quadgroup (4). A lane that would read past the end keeps its own.
#define METAL_SHUFFLES(group, mask, S)                                                                        \
  template <class T>                                                                                          \
  METAL T group##_shuffle(T v, uint lane, SIMT_SITE) {                                                        \
    return of_lane(mask, v, lane < S ? (simt::lane() & ~(S - 1u)) + lane : simt::warp_size, #group "_shuffle()", file, line); \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_broadcast(T v, uint lane, SIMT_SITE) {                                                      \
    return of_lane(mask, v, lane < S ? (simt::lane() & ~(S - 1u)) + lane : simt::warp_size, #group "_broadcast()", file, line); \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_shuffle_xor(T v, uint bits, SIMT_SITE) {                                                    \
    return of_lane(mask, v, bits < S ? simt::lane() ^ bits : simt::warp_size, #group "_shuffle_xor()", file, line); \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_shuffle_down(T v, uint by, SIMT_SITE) {                                                     \
    const uint lane = simt::lane(), within = lane & (S - 1u);                                                 \
    return of_lane(mask, v, by < S - within ? lane + by : lane, #group "_shuffle_down()", file, line);        \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_shuffle_up(T v, uint by, SIMT_SITE) {                                                       \
    const uint lane = simt::lane(), within = lane & (S - 1u);                                                 \
    return of_lane(mask, v, by <= within ? lane - by : lane, #group "_shuffle_up()", file, line);             \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_shuffle_rotate_down(T v, uint by, SIMT_SITE) {                                              \
    const uint lane = simt::lane(), first = lane & ~(S - 1u);                                                 \
    return of_lane(mask, v, first + ((lane + by) & (S - 1u)), #group "_shuffle_rotate_down()", file, line);   \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL T group##_shuffle_rotate_up(T v, uint by, SIMT_SITE) {                                                \
    const uint lane = simt::lane(), first = lane & ~(S - 1u);                                                 \
    return of_lane(mask, v, first + ((lane - by) & (S - 1u)), #group "_shuffle_rotate_up()", file, line);     \
  }
METAL_SHUFFLES(simd, simt::all_lanes, 32u) METAL_SHUFFLES(quad, quad(), 4u)
#undef METAL_SHUFFLES

// What all lanes, or those before one, come to: from the first lane to the last.
template <class T, class F>
METAL T over_lanes(uint32_t mask, uint32_t last, bool include, T v, T start, F combine, const char* name, const char* file, int line) {
  if constexpr (count<T>::value > 1) {
    for (int i = 0; i < T::size; ++i)
      v.data[i] = over_lanes(mask, last, include, v.data[i], start.data[i], combine, name, file, line);
    return v;
  } else {
    uint32_t came;
    const uint64_t* all = simt::gather(mask, simt::bits_as<uint64_t>(v), &came, name, file, line);
    bool first = true;
    for (uint32_t i = 0; i < last + include; ++i)
      if (came >> i & 1) {
        T each;
        __builtin_memcpy(&each, all + i, sizeof(T));
        start = first ? each : static_cast<T>(combine(start, each));
        first = false;
      }
    return start;
  }
}
#define METAL_REDUCE(group, mask, name, start, expression)                                                    \
  template <class T>                                                                                          \
  METAL T group##_##name(T v, SIMT_SITE) {                                                                    \
    return over_lanes(mask, 31, true, v, T(start), [](auto a, auto b) { return expression; },                 \
                      #group "_" #name "()", file, line);                                                     \
  }
#define METAL_REDUCTIONS(group, mask)                                                                         \
  METAL_REDUCE(group, mask, sum, 0, a + b) METAL_REDUCE(group, mask, product, 1, a * b)                       \
  METAL_REDUCE(group, mask, min, 0, min(a, b)) METAL_REDUCE(group, mask, max, 0, max(a, b))                   \
  METAL_REDUCE(group, mask, and, 0, a & b) METAL_REDUCE(group, mask, or, 0, a | b) METAL_REDUCE(group, mask, xor, 0, a ^ b)
METAL_REDUCTIONS(simd, simt::all_lanes) METAL_REDUCTIONS(quad, quad())
#undef METAL_REDUCTIONS
#undef METAL_REDUCE
#define METAL_PREFIX(group, mask, name, include, start, expression)                                           \
  template <class T>                                                                                          \
  METAL T group##_prefix_##name(T v, SIMT_SITE) {                                                             \
    return over_lanes(mask, simt::lane(), include, v, T(start), [](auto a, auto b) { return expression; },    \
                      #group "_prefix_" #name "()", file, line);                                              \
  }
#define METAL_PREFIXES(group, mask)                                                                           \
  METAL_PREFIX(group, mask, inclusive_sum, true, 0, a + b) METAL_PREFIX(group, mask, exclusive_sum, false, 0, a + b) \
  METAL_PREFIX(group, mask, inclusive_product, true, 1, a * b)                                                \
  METAL_PREFIX(group, mask, exclusive_product, false, 1, a * b)
METAL_PREFIXES(simd, simt::all_lanes) METAL_PREFIXES(quad, quad())
#undef METAL_PREFIXES
#undef METAL_PREFIX

struct simd_vote {
  uint set, came;
  METAL explicit operator ulong() const { return set; }
  METAL bool all() const { return set == came; }
  METAL bool any() const { return set != 0; }
};
METAL simd_vote vote(bool p, const char* name, const char* file, int line) {
  simd_vote result = {};
  const uint64_t* all = simt::gather(simt::all_lanes, p, &result.came, name, file, line);
  for (uint32_t i = 0; i < simt::warp_size; ++i) result.set |= static_cast<uint>((result.came >> i & 1) && all[i]) << i;
  return result;
}
METAL uint first_lane(uint lanes) { return static_cast<uint>(__builtin_ctz(lanes)); }
METAL simd_vote simd_ballot(bool p, SIMT_SITE) { return vote(p, "simd_ballot()", file, line); }
METAL bool simd_any(bool p, SIMT_SITE) { return vote(p, "simd_any()", file, line).any(); }
METAL bool simd_all(bool p, SIMT_SITE) { return vote(p, "simd_all()", file, line).all(); }
METAL simd_vote simd_active_threads_mask(SIMT_SITE) { return vote(true, "simd_active_threads_mask()", file, line); }
METAL bool simd_is_first(SIMT_SITE) { return simt::lane() == first_lane(vote(true, "simd_is_first()", file, line).came); }
template <class T>
METAL T simd_broadcast_first(T v, SIMT_SITE) {
  const uint from = first_lane(vote(true, "simd_broadcast_first()", file, line).came);
  return of_lane(simt::all_lanes, v, from, "simd_broadcast_first()", file, line);
}

template <class T>
struct atomic {
  T value;
};
#define METAL_ATOMIC(name, expression)                                                                        \
  template <class T>                                                                                          \
  METAL T atomic_##name##_explicit(volatile atomic<T>* p, typename found<T>::type v, memory_order) {          \
    return simt::atomic(const_cast<T*>(&p->value), [v](T old) { (void)old; return static_cast<T>(expression); }); \
  }
METAL_ATOMIC(exchange, v) METAL_ATOMIC(fetch_add, old + v) METAL_ATOMIC(fetch_sub, old - v)
METAL_ATOMIC(fetch_min, old < v ? old : v) METAL_ATOMIC(fetch_max, old > v ? old : v)
METAL_ATOMIC(fetch_and, old & v) METAL_ATOMIC(fetch_or, old | v) METAL_ATOMIC(fetch_xor, old ^ v)
#undef METAL_ATOMIC
template <class T>
METAL void atomic_store_explicit(volatile atomic<T>* p, typename found<T>::type v, memory_order) {
  simt::atomic_load(const_cast<T*>(&p->value), sizeof(T), false);
  simt::atomic_store(const_cast<T*>(&p->value), sizeof(T), simt::bits_as<uint64_t>(static_cast<T>(v)));
}
template <class T>
METAL T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  return simt::atomic(const_cast<T*>(&p->value), [](T old) { return old; });
}
template <class T>
METAL bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, typename found<T>::type v,
                                                 memory_order, memory_order) {
  const T wanted = *expected;
  *expected = simt::atomic(const_cast<T*>(&p->value), [wanted, v](T old) { return old == wanted ? v : old; });
  return *expected == wanted;
}

template <class T, size_t N>
struct array {
  T elements[N];
  METAL constexpr T& operator[](size_t i) { return elements[i]; }
  METAL constexpr const T& operator[](size_t i) const { return elements[i]; }
  METAL constexpr size_t size() const { return N; }
};

}  // namespace metal

using atomic_int = metal::atomic<int>;
using atomic_uint = metal::atomic<uint>;
using atomic_ulong = metal::atomic<ulong>;
using atomic_float = metal::atomic<float>;
using atomic_bool = metal::atomic<bool>;
using metal::as_type;  // Metal's own language, not its library's
namespace metal {
using ::atomic_int, ::atomic_uint, ::atomic_ulong, ::atomic_float, ::atomic_bool;
}

// Words of the language, the last that is defined here. An array of a threadgroup is declared by SIMT_SHARED, which is
// put in the place of `threadgroup` before the compiler sees the text.
#define kernel
#define SIMT_ALSO
#define device
#define thread
#define threadgroup
#define constant const
#define volatile
