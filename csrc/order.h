/* The order of tokens: by falling logit, and by rising id among equals. rank() makes one number of a token's logit
 * and id, greater for the better token. A `struct cut` names the last token of a run of the best. A heap of ranks
 * gives the best first.
 *
 * Pure functions of their arguments. */

#ifndef TOAI_ORDER_H
#define TOAI_ORDER_H

#include <stdint.h>
#include <string.h>

/* The candidates: every token with x > this x, and those with x equal and id <= this id. */
struct cut {
    float x;
    int32_t id;
};

/* A float's place in the order of all floats, as an unsigned number. -0 counts as 0. */
static inline uint32_t key_of(float x)
{
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float float_of(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The least float above x; x is finite. */
static inline float above(float x)
{
    return float_of(key_of(x) + 1);
}

/* One number per token, greater for the better: by logit, then by lower id. */
static inline uint64_t rank(float x, int32_t id)
{
    return (uint64_t)key_of(x) << 32 | (uint32_t)~id;
}

static inline struct cut cut_of(uint64_t ranked)
{
    return (struct cut){float_of((uint32_t)(ranked >> 32)), (int32_t)~(uint32_t)ranked};
}

/* Moves a[at] down until no child is greater. */
static inline void sift(uint64_t *a, int32_t n, int32_t at)
{
    uint64_t value = a[at];
    for (int32_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && a[child + 1] > a[child];
        if (a[child] <= value)
            break;
        a[at] = a[child];
    }
    a[at] = value;
}

/* Makes a heap, greatest first. O(n). */
static inline void make_heap(uint64_t *a, int32_t n)
{
    for (int32_t i = n / 2 - 1; i >= 0; i--)
        sift(a, n, i);
}

/* Moves the greatest of n to a[n - 1] and returns it; the others are a heap of n - 1. O(log n). */
static inline uint64_t pop(uint64_t *a, int32_t n)
{
    uint64_t best = a[0];
    a[0] = a[n - 1];
    a[n - 1] = best;
    sift(a, n - 1, 0);
    return best;
}

/* Moves the ranks that are greater than the median of three of them to the front; returns how many. n >= 3 distinct
 * ranks, so that some move and some do not. O(n). */
static inline int32_t partition(uint64_t *a, int32_t n)
{
    uint64_t x = a[0], y = a[n / 2], z = a[n - 1];
    uint64_t low = x < y ? x : y, high = x < y ? y : x;
    uint64_t pivot = z < low ? low : z < high ? z : high;
    int32_t n_better = 0;
    for (int32_t i = 0; i < n; i++) {
        uint64_t value = a[i];
        a[i] = a[n_better];
        a[n_better] = value;
        n_better += value > pivot;
    }
    return n_better;
}

#endif
