/* Helpers of the C tests: a check with a message, and memory that ends at an inaccessible page. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition, ...)                                                                                  \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                    \
            fprintf(stderr, __VA_ARGS__);                                                                      \
            fputc('\n', stderr);                                                                               \
            abort();                                                                                           \
        }                                                                                                      \
    } while (0)

/* A copy of n bytes whose last byte is the last before a PROT_NONE page; read-only when `locked`. */
struct guarded {
    void *data;
    void *pages;
    size_t n_pages_bytes;
};

static inline struct guarded guard(const void *bytes, size_t n, int locked)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t usable = (n + page - 1) / page * page;
    struct guarded g = {.n_pages_bytes = usable + page};
    g.pages = mmap(NULL, g.n_pages_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.pages != MAP_FAILED, "mmap of %zu bytes", g.n_pages_bytes);
    g.data = (char *)g.pages + usable - n;
    if (bytes != NULL && n > 0)
        memcpy(g.data, bytes, n);
    if (locked && usable > 0)
        CHECK(mprotect(g.pages, usable, PROT_READ) == 0, "mprotect");
    CHECK(mprotect((char *)g.pages + usable, page, PROT_NONE) == 0, "mprotect");
    return g;
}

static inline void unguard(struct guarded g)
{
    munmap(g.pages, g.n_pages_bytes);
}

/* The tests' own random numbers: xorshift64* (Vigna, 2016). */
static inline uint64_t roll(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static inline double roll_unit(uint64_t *state)
{
    return (double)(roll(state) >> 11) * 0x1p-53;
}
