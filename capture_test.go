package pyro

import (
	"bytes"
	"encoding/base64"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestWhatIsKeptIsTheBeginningHoweverItIsWritten(t *testing.T) {
	const printed = "a é € 😀 z"
	for limit := range len(printed) + 2 {
		for piece := 1; piece <= len(printed); piece++ {
			c := &capture{limit: limit}
			for rest := printed; rest != ""; {
				n := min(piece, len(rest))
				if got, err := c.Write([]byte(rest[:n])); got != n || err != nil {
					t.Fatalf("write: %d of %d, %v", got, n, err)
				}
				rest = rest[n:]
			}
			text, encoding := c.text()
			if encoding != "" || !utf8.ValidString(text) || !strings.HasPrefix(printed, text) || len(text) > limit {
				t.Errorf("limit %d, pieces of %d: %q (%s)", limit, piece, text, encoding)
			}
			if missing := min(limit, len(printed)) - len(text); missing > 3 {
				t.Errorf("limit %d, pieces of %d: %d bytes less than there is room for", limit, piece, missing)
			}
			if c.total != int64(len(printed)) || c.truncated() != (limit < len(printed)) {
				t.Errorf("limit %d: %d in all, truncated %v", limit, c.total, c.truncated())
			}
		}
	}
}

func TestRunesAreKeptWholeOrNotAtAll(t *testing.T) {
	for r := range utf8.MaxRune + 1 {
		if r%97 != 0 && r > 0x3000 || !utf8.ValidRune(r) {
			continue
		}
		whole := []byte("x" + string(r))
		if got := wholeRunes(whole); !bytes.Equal(got, whole) {
			t.Fatalf("%q becomes %q", whole, got)
		}
		for n := 2; n < len(whole); n++ {
			if got := wholeRunes(whole[:n]); string(got) != "x" {
				t.Fatalf("%q becomes %q", whole[:n], got)
			}
		}
	}
	for _, s := range []string{"", "\x80", "\x80\x80\x80\x80\x80", "a\xff", "\xc3\xa9\xa9"} {
		if got := wholeRunes([]byte(s)); string(got) != s {
			t.Errorf("%q, which no cut explains, becomes %q", s, got)
		}
	}
}

func TestNoteFollowsWhatWasKept(t *testing.T) {
	for printed, want := range map[string]string{"": "note\n", "a": "a\nnote\n", "a\n": "a\nnote\n", "\n": "\nnote\n"} {
		c := &capture{limit: 10}
		c.Write([]byte(printed))
		c.note("note\n")
		if text, _ := c.text(); text != want {
			t.Errorf("after %q: %q, want %q", printed, text, want)
		}
		if c.total != int64(len(printed)) {
			t.Errorf("after %q: %d bytes are counted", printed, c.total)
		}
	}
	c := &capture{limit: 10}
	c.Write([]byte("\xff"))
	c.note("note\n")
	text, encoding := c.text()
	if b, err := base64.StdEncoding.DecodeString(text); err != nil || string(b) != "\xff\nnote\n" || encoding != "base64" {
		t.Errorf("%q (%s), %v", b, encoding, err)
	}
}
