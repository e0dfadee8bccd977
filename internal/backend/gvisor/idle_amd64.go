package gvisor

import "debug/elf"

const idleMachine = elf.EM_X86_64

var idleCode = []byte{
	0xb8, 0x0d, 0x00, 0x00, 0x00, //       mov eax, 13 (rt_sigaction)
	0xbf, 0x11, 0x00, 0x00, 0x00, //       mov edi, 17 (SIGCHLD)
	0x48, 0x8d, 0x35, 0x13, 0x00, 0x00, 0x00, // lea rsi, [rip+act]
	0x31, 0xd2, //                         xor edx, edx
	0x41, 0xba, 0x08, 0x00, 0x00, 0x00, // mov r10d, 8 (size of a signal set)
	0x0f, 0x05, //                         syscall
	0xb8, 0x22, 0x00, 0x00, 0x00, // wait: mov eax, 34 (pause)
	0x0f, 0x05, //                         syscall
	0xeb, 0xf7, //                         jmp wait
	// act: the handler SIG_IGN, then flags, restorer and mask, all empty.
	0x01, 0, 0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0,
}
