/* Exchanges between the ranks of one host through memory that they share: a ring of bytes for each ordered pair.
 *
 * The memory begins as zeros. For `size` ranks it holds one line of 64 bytes for each rank (its bell), and then for
 * each pair (source, target) a line that the source writes, a line that the target writes, and `capacity` bytes.
 * A rank that waits looks for a while, then sleeps on its bell; whoever moves bytes to or from it rings.
 * What is called from outside has a prefix, for the C library has functions with short names of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 64

typedef struct {
    uint32_t rung;     /* grows with every ring */
    uint32_t sleeping; /* whether its rank sleeps on it, or is about to */
    uint32_t left;     /* whether its rank has left the group */
} Bell;

typedef struct {
    const char *send; /* what is not in the ring yet */
    char *receive;    /* where what has not come yet goes */
    int64_t to_send, to_receive;
} Part; /* of an exchange, for one peer; changed as it moves on */

typedef struct {
    char *memory;
    int64_t rank, size, capacity;
} Rings;

static Bell *bell(const Rings *rings, int64_t rank) { return (Bell *)(rings->memory + rank * LINE); }

static char *pair(const Rings *rings, int64_t source, int64_t target) {
    return rings->memory + rings->size * LINE + (source * rings->size + target) * (2 * LINE + rings->capacity);
}

static void ring_bell(Bell *of) {
    __atomic_fetch_add(&of->rung, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&of->sleeping, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &of->rung, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Puts what fits into the ring; whether anything did. */
static int push(const Rings *rings, int64_t peer, Part *part) {
    char *line = pair(rings, rings->rank, peer);
    uint64_t *written = (uint64_t *)line, *read = (uint64_t *)(line + LINE);
    uint64_t at = *written; /* only this rank writes it */
    int64_t room = rings->capacity - (int64_t)(at - __atomic_load_n(read, __ATOMIC_ACQUIRE));
    int64_t count = least(room, part->to_send);
    if (!count) return 0;
    int64_t offset = at % rings->capacity, first = least(count, rings->capacity - offset);
    memcpy(line + 2 * LINE + offset, part->send, first);
    memcpy(line + 2 * LINE, part->send + first, count - first);
    part->send += count;
    part->to_send -= count;
    __atomic_store_n(written, at + count, __ATOMIC_RELEASE);
    return 1;
}

/* Takes what has come out of the ring; whether anything had. */
static int pull(const Rings *rings, int64_t peer, Part *part) {
    char *line = pair(rings, peer, rings->rank);
    uint64_t *written = (uint64_t *)line, *read = (uint64_t *)(line + LINE);
    uint64_t at = *read; /* only this rank writes it */
    int64_t come = (int64_t)(__atomic_load_n(written, __ATOMIC_ACQUIRE) - at);
    int64_t count = least(come, part->to_receive);
    if (!count) return 0;
    int64_t offset = at % rings->capacity, first = least(count, rings->capacity - offset);
    memcpy(part->receive, line + 2 * LINE + offset, first);
    memcpy(part->receive + first, line + 2 * LINE, count - first);
    part->receive += count;
    part->to_receive -= count;
    __atomic_store_n(read, at + count, __ATOMIC_RELEASE);
    return 1;
}

/* Moves what can be moved, without waiting; 1 when the exchange is complete. */
int rings_advance(const Rings *rings, Part *parts) {
    int complete = 1;
    for (int64_t peer = 0; peer < rings->size; peer++) {
        Part *part = parts + peer;
        int moved = part->to_send && push(rings, peer, part);
        if (part->to_receive) moved |= pull(rings, peer, part);
        if (moved) ring_bell(bell(rings, peer));
        complete &= !part->to_send && !part->to_receive;
    }
    return complete;
}

/* Whether a peer that is still needed has left. */
static int deserted(const Rings *rings, const Part *parts) {
    for (int64_t peer = 0; peer < rings->size; peer++)
        if ((parts[peer].to_send || parts[peer].to_receive) &&
            __atomic_load_n(&bell(rings, peer)->left, __ATOMIC_ACQUIRE))
            return 1;
    return 0;
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

/* Moves until the exchange is complete: `awake_ns` without sleeping, then once to sleep for `asleep_ns` at most.
 * 1: complete. 0: not yet. -1: it never will be, a peer has left. */
int rings_wait(const Rings *rings, Part *parts, int64_t awake_ns, int64_t asleep_ns) {
    for (int64_t asleep_at = now_ns() + awake_ns; now_ns() < asleep_at; sched_yield())
        if (rings_advance(rings, parts)) return 1;
    Bell *own = bell(rings, rings->rank);
    uint32_t rung = __atomic_load_n(&own->rung, __ATOMIC_SEQ_CST);
    __atomic_store_n(&own->sleeping, 1, __ATOMIC_SEQ_CST);
    int gone = deserted(rings, parts); /* before the last look: what it sent before it left has come */
    int complete = rings_advance(rings, parts);
    if (!complete && !gone) {
        struct timespec timeout = {asleep_ns / 1000000000ll, asleep_ns % 1000000000ll};
        syscall(SYS_futex, &own->rung, FUTEX_WAIT, rung, &timeout, NULL, 0);
        complete = rings_advance(rings, parts);
    }
    __atomic_store_n(&own->sleeping, 0, __ATOMIC_SEQ_CST);
    return complete ? 1 : gone ? -1 : 0;
}

/* Says to all that this rank has left, and wakes them. */
void rings_leave(const Rings *rings) {
    __atomic_store_n(&bell(rings, rings->rank)->left, 1, __ATOMIC_RELEASE);
    for (int64_t peer = 0; peer < rings->size; peer++) ring_bell(bell(rings, peer));
}
