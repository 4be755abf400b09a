/* A WASI command: counts the lines, words and bytes of standard input, or, given arguments, adds
 * them up. The status is 0, 1 where there is not one word, 2 where an argument is no number.
 *
 *   clang --target=wasm32-wasi -O2 -g -o words.wasm words.c
 *   manifold run words.wasm -- 1 2 3.5
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

static int add_up(int count, char **texts) {
    double total = 0;
    for (int i = 0; i < count; i++) {
        char *end;
        total += strtod(texts[i], &end);
        if (end == texts[i] || *end != '\0') {
            fprintf(stderr, "words: %s is no number\n", texts[i]);
            return 2;
        }
    }
    printf("%g\n", total);
    return 0;
}

static int count_words(FILE *input) {
    long lines = 0, words = 0, bytes = 0;
    int in_word = 0;
    for (int c; (c = getc(input)) != EOF; bytes++) {
        lines += c == '\n';
        words += !isspace(c) && !in_word;
        in_word = !isspace(c);
    }
    printf("%ld lines, %ld words, %ld bytes\n", lines, words, bytes);
    return words ? 0 : 1;
}

int main(int argc, char **argv) {
    return argc > 1 ? add_up(argc - 1, argv + 1) : count_words(stdin);
}
