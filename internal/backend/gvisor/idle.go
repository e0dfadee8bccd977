package gvisor

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The program that is process 1 of a sandbox does nothing: it ignores SIGCHLD,
// so that the kernel (gVisor's) frees orphans when they end, and sleeps. It is
// so small that it starts in no time and needs no file in the environment, and
// that it can be read here in full: idleCode, one per processor architecture,
// is all of it.

// idleBase is where the program is mapped.
const idleBase = 0x400000

// idleELF returns the program as an ELF executable of one segment.
func idleELF() []byte {
	header := elf.Header64{
		Ident:     [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:      uint16(elf.ET_EXEC),
		Machine:   uint16(idleMachine),
		Version:   uint32(elf.EV_CURRENT),
		Ehsize:    uint16(binary.Size(elf.Header64{})),
		Phentsize: uint16(binary.Size(elf.Prog64{})),
		Phnum:     1,
	}
	start := uint64(header.Ehsize + header.Phentsize)
	size := start + uint64(len(idleCode))
	header.Phoff = uint64(header.Ehsize)
	header.Entry = idleBase + start
	segment := elf.Prog64{
		Type:   uint32(elf.PT_LOAD),
		Flags:  uint32(elf.PF_R | elf.PF_X),
		Vaddr:  idleBase,
		Paddr:  idleBase,
		Filesz: size,
		Memsz:  size,
		Align:  0x1000,
	}
	var b bytes.Buffer
	// Writing fixed-size values to a bytes.Buffer cannot fail.
	binary.Write(&b, binary.LittleEndian, &header)
	binary.Write(&b, binary.LittleEndian, &segment)
	b.Write(idleCode)
	return b.Bytes()
}

// idleFile returns the program as an open file in memory, for gVisor to
// execute. The caller closes it.
func idleFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("pyro-init", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the init program: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pyro-init")
	defer f.Close()
	if _, err := f.Write(idleELF()); err != nil {
		return nil, fmt.Errorf("write the init program: %w", err)
	}
	// gVisor takes only what is open for reading and nothing else.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open the init program: %w", err)
	}
	return ro, nil
}
