/* What the guests' compiler compiles: an evaluator of arithmetic, a table of words and a sort. Prints one line. */

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct parser {
    const char *at;
    int failed;
};

static double sum(struct parser *parser);

static void skip_blanks(struct parser *parser)
{
    while (isspace((unsigned char)*parser->at))
        parser->at++;
}

static double value(struct parser *parser)
{
    skip_blanks(parser);
    if (*parser->at == '(') {
        parser->at++;
        double inner = sum(parser);
        skip_blanks(parser);
        if (*parser->at == ')')
            parser->at++;
        else
            parser->failed = 1;
        return inner;
    }
    if (*parser->at == '-') {
        parser->at++;
        return -value(parser);
    }
    char *end;
    errno = 0;
    double number = strtod(parser->at, &end);
    if (end == parser->at || errno == ERANGE)
        parser->failed = 1;
    parser->at = end;
    return number;
}

static double power(struct parser *parser)
{
    double base = value(parser);
    skip_blanks(parser);
    if (*parser->at != '^')
        return base;
    parser->at++;
    return pow(base, power(parser));
}

static double product(struct parser *parser)
{
    double result = power(parser);
    for (;;) {
        skip_blanks(parser);
        switch (*parser->at) {
        case '*':
            parser->at++;
            result *= power(parser);
            break;
        case '/':
            parser->at++;
            result /= power(parser);
            break;
        default:
            return result;
        }
    }
}

static double sum(struct parser *parser)
{
    double result = product(parser);
    for (;;) {
        skip_blanks(parser);
        if (*parser->at == '+') {
            parser->at++;
            result += product(parser);
        } else if (*parser->at == '-') {
            parser->at++;
            result -= product(parser);
        } else {
            return result;
        }
    }
}

struct word {
    struct word *next;
    unsigned count;
    char text[];
};

#define BUCKETS 64
static struct word *words[BUCKETS];

static uint64_t hash(const char *text)
{
    uint64_t state = UINT64_C(0xcbf29ce484222325);
    for (; *text; text++)
        state = (state ^ (unsigned char)*text) * UINT64_C(0x100000001b3);
    return state;
}

static struct word *count(const char *text)
{
    struct word **place = &words[hash(text) % BUCKETS];
    for (; *place; place = &(*place)->next)
        if (!strcmp((*place)->text, text))
            break;
    if (!*place) {
        size_t size = strlen(text) + 1;
        *place = calloc(1, sizeof(**place) + size);
        if (!*place)
            abort();
        memcpy((*place)->text, text, size);
    }
    (*place)->count++;
    return *place;
}

static int by_count(const void *left, const void *right)
{
    const struct word *a = *(struct word *const *)left, *b = *(struct word *const *)right;
    if (a->count != b->count)
        return a->count < b->count ? 1 : -1;
    return strcmp(a->text, b->text);
}

static void transpose_and_scale(double (*restrict to)[16], double (*restrict from)[16], double factor)
{
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 16; column++)
            to[column][row] = factor * from[row][column] + fma(row, column, 0.5);
}

int main(void)
{
    char text[] = "the page and the frame and the page that the frame holds and the page";
    struct word *all[BUCKETS];
    size_t found = 0;
    for (char *rest, *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
        count(word);
    for (size_t bucket = 0; bucket < BUCKETS; bucket++)
        for (struct word *word = words[bucket]; word; word = word->next)
            if (found < BUCKETS)
                all[found++] = word;
    qsort(all, found, sizeof(*all), by_count);

    struct parser parser = { "2 * (3 + 4) ^ 2 - -6 / 4", 0 };
    double result = sum(&parser);
    double one[16][16] = { { 0 } }, other[16][16];
    for (int times = 0; times < 8; times++) {
        transpose_and_scale(other, one, 0.5);
        transpose_and_scale(one, other, 0.25);
    }
    printf("%zu %s %u %.2f %.3f\n", found, all[0]->text, all[0]->count, parser.failed ? NAN : result, one[15][15]);
    return 0;
}
