/* Compiles simd_loops.h twice, as simd_any and simd_avx2, and picks the copy for this machine. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd.h"

#ifdef HAVE_AVX2_COPY
#include <immintrin.h>
#endif

#define SIMD(name) name##_any
#define SIMD_TARGET
#include "simd_loops.h"
#undef SIMD
#undef SIMD_TARGET

const struct simd simd_any = {scan_any, at_least_any, softmax_block_any, buckets_any, mask_any};

#ifdef HAVE_AVX2_COPY
#define SIMD(name) name##_avx2
#define SIMD_TARGET __attribute__((target("avx2")))
#define SIMD_AVX2
#include "simd_loops.h"
#undef SIMD
#undef SIMD_TARGET
#undef SIMD_AVX2

const struct simd simd_avx2 = {scan_avx2, at_least_avx2, softmax_block_avx2, buckets_avx2, mask_avx2};
#endif

struct simd simd_best(void)
{
#ifdef HAVE_AVX2_COPY
    if (__builtin_cpu_supports("avx2"))
        return simd_avx2;
#endif
    return simd_any;
}
