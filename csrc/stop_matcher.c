/* The stop matcher: finds stop sequences in a stream of bytes. api.h says exactly what it does.
 *
 * It is an Aho-Corasick automaton (Aho and Corasick, 1975) over a trie of at most 1 + the sum of the pattern lengths
 * nodes. Nodes are numbered breadth first with the patterns sorted, so the children of a node are neighbours in
 * rising order of their byte, and a node needs no table, only where its children begin and how many there are.
 * A step to a child is a binary search among at most TOAI_MAX_PATTERNS; every step along a fail link makes the
 * state shallower and every byte makes it at most one deeper, so n bytes take at most 2 n steps. The depth of
 * the state is the length of the longest end of the stream that begins a pattern: the bytes to hold. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

struct node {
    int32_t children; /* the first child */
    int32_t fail;     /* the state of the longest proper suffix that begins a pattern; -1 at the root */
    uint16_t depth;
    uint16_t match;   /* length of the longest pattern that ends here; 0: none */
    uint8_t byte;     /* the byte that leads here */
    uint8_t n_children;
    uint8_t low, high; /* while building: the sorted patterns [low, high) pass through here */
};

struct toai_stop {
    int32_t state;
    int32_t done;
    struct node nodes[];
};

size_t toai_stop_size(int32_t n_patterns, size_t n_bytes)
{
    if (n_patterns < 1 || n_patterns > TOAI_MAX_PATTERNS || n_bytes < (size_t)n_patterns
        || n_bytes > (size_t)n_patterns * TOAI_MAX_PATTERN_BYTES)
        return 0;
    return sizeof(struct toai_stop) + (n_bytes + 1) * sizeof(struct node);
}

/* The child that this byte leads to, or -1. */
static int32_t child_of(const struct toai_stop *stop, int32_t node, uint8_t byte)
{
    int32_t low = stop->nodes[node].children, high = low + stop->nodes[node].n_children;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (stop->nodes[middle].byte == byte)
            return middle;
        if (stop->nodes[middle].byte < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return -1;
}

/* The state after `byte`; amortised O(log TOAI_MAX_PATTERNS). */
static int32_t step(const struct toai_stop *stop, int32_t state, uint8_t byte)
{
    for (; state >= 0; state = stop->nodes[state].fail) {
        int32_t child = child_of(stop, state, byte);
        if (child >= 0)
            return child;
    }
    return 0;
}

static int before(const uint8_t *a, int32_t n_a, const uint8_t *b, int32_t n_b)
{
    int order = memcmp(a, b, (size_t)(n_a < n_b ? n_a : n_b));
    return order != 0 ? order < 0 : n_a < n_b;
}

int32_t toai_stop_init(toai_stop *stop, size_t size, const uint8_t *bytes, const int32_t *lengths,
                       int32_t n_patterns)
{
    const uint8_t *pattern[TOAI_MAX_PATTERNS];
    int32_t length[TOAI_MAX_PATTERNS];
    size_t n_bytes = 0;

    if (stop == NULL || (uintptr_t)stop % 8 != 0 || bytes == NULL || lengths == NULL || n_patterns < 1
        || n_patterns > TOAI_MAX_PATTERNS)
        return TOAI_E_ARG;
    for (int32_t i = 0; i < n_patterns; i++) { /* insertion sort: at most 64 patterns */
        if (lengths[i] < 1 || lengths[i] > TOAI_MAX_PATTERN_BYTES)
            return TOAI_E_ARG;
        int32_t at = i;
        for (; at > 0 && before(bytes + n_bytes, lengths[i], pattern[at - 1], length[at - 1]); at--) {
            pattern[at] = pattern[at - 1];
            length[at] = length[at - 1];
        }
        pattern[at] = bytes + n_bytes;
        length[at] = lengths[i];
        n_bytes += (size_t)lengths[i];
    }
    if (size < toai_stop_size(n_patterns, n_bytes))
        return TOAI_E_ARG;

    *stop = (struct toai_stop){0};
    stop->nodes[0] = (struct node){.fail = -1, .high = (uint8_t)n_patterns};
    int32_t n_nodes = 1;
    for (int32_t i = 0; i < n_nodes; i++) {
        struct node *node = stop->nodes + i;
        int32_t depth = node->depth, at = node->low;
        while (at < node->high && length[at] == depth) { /* the shortest sort first; equal ones end together */
            node->match = node->depth;
            at++;
        }
        node->children = n_nodes;
        while (at < node->high) {
            uint8_t byte = pattern[at][depth];
            int32_t first = at;
            while (at < node->high && pattern[at][depth] == byte)
                at++;
            stop->nodes[n_nodes++] = (struct node){.depth = (uint16_t)(depth + 1),
                                                   .byte = byte,
                                                   .low = (uint8_t)first,
                                                   .high = (uint8_t)at,
                                                   .fail = i == 0 ? 0 : step(stop, node->fail, byte)};
            node->n_children++;
        }
        if (node->match == 0 && node->fail >= 0)
            node->match = stop->nodes[node->fail].match;
    }
    return TOAI_OK;
}

int64_t toai_stop_feed(toai_stop *stop, const uint8_t *bytes, size_t n)
{
    if (stop->done)
        return -1;
    int64_t n_text = stop->nodes[stop->state].depth; /* held bytes, then those fed so far */
    for (size_t i = 0; i < n; i++) {
        stop->state = step(stop, stop->state, bytes[i]);
        n_text++;
        int32_t match = stop->nodes[stop->state].match;
        if (match > 0) {
            stop->done = 1;
            return -1 - (n_text - match);
        }
    }
    return n_text - stop->nodes[stop->state].depth;
}
