// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// overlay_floor MIB RUN [writers] [thp] [split] [WORD...]: what one overlay costs at least, in plain C, one thread.
// Anonymous "guest memory" holds permuted runs of a memfd "store"; each run is write-protected, compared, mapped over, woken.
// writers=1 writes to random pages meanwhile and checks that no write is lost; thp=1 asks for huge pages;
// split=1 splits them first (MADV_COLD), split=2 in the end those of which something is left. Needs vm.max_map_count above the number of runs. A measuring stick, not a model to copy.
// Words change what is measured:
//   apart     a run's worth of other memory lies behind every run
//   scattered runs come in the order of the store, which is none in guest memory
//   dontfork  guest memory has MADV_DONTFORK, which every overlay is given again
//   unseen    the store is mapped anew, so that its pages are looked at for the first time
//   publish   what copying all of it into new memory of another memfd costs is told first, and what looking at it for the
//             first time and unmapping it does: one guest's pages are, once
//   publish=DIRECTORY the same with a file in a directory, of a tmpfs with huge=within_size for instance
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#define P 4096UL
static uint8_t *ram;
static size_t N, run, stride;
static volatile int stop;
static uint64_t *expect, writes;
static double now(clockid_t c) { struct timespec t; clock_gettime(c, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
// Page i of what is overlaid.
static uint8_t *at(size_t i) { return ram + (i / run * stride + i % run) * P; }
static void *drain(void *a) { struct uffd_msg m; while (read(*(int *)a, &m, sizeof m) == sizeof m) ; return 0; }
static void *writer(void *a) {
    unsigned s = 1;
    (void)a;
    while (!stop) {
        size_t i = rand_r(&s) % N;
        uint64_t v = ((uint64_t)rand_r(&s) << 20) | 1;
        *(volatile uint64_t *)(at(i) + 8) = v;
        expect[i] = v;
        if (++writes % 64 == 0) usleep(50);
    }
    return 0;
}
int main(int c, char **v) {
    if (c < 3) return fprintf(stderr, "overlay_floor MIB RUN [writers] [thp] [split] [WORD...]\n"), 2;
    N = atol(v[1]) << 8;
    run = atol(v[2]);
    size_t R = N / run;
    int wr = c > 3 && atoi(v[3]), thp = c > 4 && atoi(v[4]), split = c > 5 ? atoi(v[5]) : 0;
    const char *directory = 0;
    int apart = 0, scattered = 0, dontfork = 0, unseen = 0, publish = 0;
    for (int i = 6; i < c; i++) {
        apart |= !strcmp(v[i], "apart");
        scattered |= !strcmp(v[i], "scattered");
        dontfork |= !strcmp(v[i], "dontfork");
        unseen |= !strcmp(v[i], "unseen");
        publish |= !strncmp(v[i], "publish", 7);
        if (!strncmp(v[i], "publish=", 8)) directory = v[i] + 8;
    }
    stride = apart ? 2 * run : run;
    size_t bytes = R * stride * P;
    int fd = memfd_create("store", 0);
    if (ftruncate(fd, N * P)) return 1;
    uint8_t *st = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    unsigned s = 7;
    for (size_t i = 0; i < N * P / 8; i++) ((uint64_t *)st)[i] = ((uint64_t)rand_r(&s) << 31) ^ i;
    ram = mmap(0, bytes + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ram = (uint8_t *)(((uintptr_t)ram + (2 << 20) - 1) & ~((2UL << 20) - 1));
    madvise(ram, bytes, thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (dontfork) madvise(ram, bytes, MADV_DONTFORK);
    if (apart) memset(ram, 1, bytes);
    uint32_t *perm = malloc(R * 4);
    for (size_t i = 0; i < R; i++) perm[i] = i;
    for (size_t i = R - 1; i > 0; i--) { size_t j = ((uint64_t)rand_r(&s) * i) >> 31; uint32_t t = perm[i]; perm[i] = perm[j]; perm[j] = t; }
    for (size_t r = 0; r < R; r++) memcpy(at(r * run), st + (size_t)perm[r] * run * P, run * P);
    uint32_t *order = malloc(R * 4);
    for (size_t r = 0; r < R; r++) order[scattered ? perm[r] : r] = r;
    if (unseen) {
        munmap(st, N * P);
        st = mmap(0, N * P, PROT_READ, MAP_SHARED, fd, 0);
    }
    if (publish) {
        int new = directory ? open(directory, O_TMPFILE | O_RDWR, 0600) : memfd_create("published", 0);
        // It grows with what is written, as the store does.
        if (new < 0) return perror(directory), 1;
        double t0 = now(CLOCK_MONOTONIC), c0 = now(CLOCK_THREAD_CPUTIME_ID);
        for (size_t i = 0; i < R; i++)
            if (pwrite(new, at(order[i] * run), run * P, (off_t)i * run * P) != (ssize_t)(run * P)) return perror("publish"), 1;
        double dt = now(CLOCK_MONOTONIC) - t0, dc = now(CLOCK_THREAD_CPUTIME_ID) - c0;
        volatile uint8_t *seen = mmap(0, R * run * P, PROT_READ, MAP_SHARED, new, 0);
        double c1 = now(CLOCK_THREAD_CPUTIME_ID);
        for (size_t i = 0; i < R * run; i++) (void)seen[i * P];
        double c2 = now(CLOCK_THREAD_CPUTIME_ID);
        munmap((void *)seen, R * run * P);
        double c3 = now(CLOCK_THREAD_CPUTIME_ID);
        printf("published %zu: %.3f us/page, %.3f us/page of CPU; seen %.3f, unmapped %.3f\n", N, dt / N * 1e6, dc / N * 1e6, (c2 - c1) / N * 1e6, (c3 - c2) / N * 1e6);
        close(new);
    }
    expect = calloc(N, 8);
    int u = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
    struct uffdio_register reg = {.range = {(uintptr_t)ram, bytes}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (u < 0 || ioctl(u, UFFDIO_API, &api) || ioctl(u, UFFDIO_REGISTER, &reg)) return perror("userfaultfd"), 1;
    pthread_t t1, t2;
    pthread_create(&t1, 0, drain, &u);
    if (wr) pthread_create(&t2, 0, writer, 0);
    double t0 = now(CLOCK_MONOTONIC), c0 = now(CLOCK_THREAD_CPUTIME_ID);
    size_t done = 0, differ = 0;
    for (size_t i = 0; i < R; i++) {
        size_t r = order[i];
        uint8_t *a = at(r * run);
        off_t o = (off_t)perm[r] * run * P;
        if (split == 1) madvise(a, run * P, MADV_COLD);
        struct uffdio_writeprotect wp = {.range = {(uintptr_t)a, run * P}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
        if (ioctl(u, UFFDIO_WRITEPROTECT, &wp)) return perror("protect"), 1;
        if (memcmp(a, st + o, run * P)) { differ += run; wp.mode = 0; ioctl(u, UFFDIO_WRITEPROTECT, &wp); continue; }
        if (mmap(a, run * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, o) == MAP_FAILED) { perror("mmap"); break; }
        if (dontfork) madvise(a, run * P, MADV_DONTFORK);
        struct uffdio_range g = {(uintptr_t)a, run * P};
        ioctl(u, UFFDIO_WAKE, &g);
        done += run;
    }
    if (split == 2 && apart) {
        // One page that is left is enough, and all that lies behind a run is.
        uintptr_t last = 0;
        for (size_t r = 0; r < R; r++) {
            uint8_t *rest = at(r * run) + run * P;
            if ((uintptr_t)rest >> 21 == last) continue;
            last = (uintptr_t)rest >> 21;
            madvise(rest, P, MADV_COLD);
        }
    }
    double dt = now(CLOCK_MONOTONIC) - t0, dc = now(CLOCK_THREAD_CPUTIME_ID) - c0;
    stop = 1;
    if (wr) pthread_join(t2, 0);
    size_t lost = 0;
    for (size_t r = 0; r < R; r++)
        for (size_t k = 0; k < run; k++) {
            size_t i = r * run + k;
            uint64_t w = ((uint64_t *)at(i))[1], o = ((uint64_t *)(st + ((size_t)perm[r] * run + k) * P))[1];
            lost += expect[i] ? w != expect[i] : w != o;
        }
    printf("pages %zu run %zu overlaid %zu differed %zu: %.3f s, %.3f us/page, %.3f us/page of CPU; writes %lu lost %zu\n", N, run, done, differ, dt, dt / N * 1e6, dc / N * 1e6, writes, lost);
    fflush(stdout);
    _exit(lost != 0);
}
