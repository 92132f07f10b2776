"""The guards of the protocol: what each keeps, and the tests that notice when it is gone.

``mutations`` takes them out one at a time, in a copy of the sources, and expects the tests named
here to fail. A change of the code that moves a guard's text is followed here; a new guard is
entered here, with a test that notices its absence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard.

    Attributes
    ----------
    name, promise
        The guard, and what it keeps.
    file, text
        Where it stands: a text that occurs once in that file.
    without
        What stands there when it is taken out.
    noticed_by
        Tests below ``tests/`` of which at least one must fail then.
    gpu
        Whether these need a CUDA device.
    """

    name: str
    promise: str
    file: str
    text: str
    without: str
    noticed_by: tuple[str, ...]
    gpu: bool = False

    @property
    def suite(self) -> str:
        """The folder of its tests."""
        return self.noticed_by[0].partition("/")[0]


_WRITER = (
    Guard(
        "the writer's lease from reserve to seal",
        "a record in flight is waited for, and not taken for one whose writer died",
        "shmroute/writer.py",
        "            if self._leases.try_acquire(slot):\n                return self._free_slots",
        "            if True:\n                return self._free_slots",
        ("store/test_search.py::test_a_record_in_flight_is_route_timeout",),
    ),
    Guard(
        "the writer's leases on the slots of a step",
        "as for one record",
        "shmroute/writer.py",
        "if self._leases.try_acquire_run(self._free_slots[0], run):",
        "if True:",
        (
            "bridge/test_reserving_together.py::"
            "test_each_has_its_slot_s_lease_also_over_the_end_of_a_lease_file",
        ),
    ),
    Guard(
        "space of records that could not be reserved together",
        "it is free again",
        "shmroute/writer.py",
        "                if offset < end:\n",
        "                if False:\n",
        (
            "bridge/test_reserving_together.py::"
            "test_those_before_the_last_slot_are_reserved_and_the_rest_of_the_space_is_given_back",
        ),
    ),
    Guard(
        "the odd word",
        "a record whose writer died before the seal is WriterDied, never handed out",
        "shmroute/writer.py",
        "self._words[slot] = generation + 1",
        "self._words[slot] = generation",
        ("store/test_deaths.py::test_an_unsealed_record_of_a_killed_writer_is_writer_died",),
    ),
    Guard(
        "the even word after all that it stands for",
        "SIGKILL in the middle of a seal leaves an unsealed record, not half a sealed one",
        "shmroute/writer.py",
        '"""Everything that the even word stands for."""',
        "self._words[record.slot] = record.generation",
        ("store/test_seal_order.py::test_a_writer_killed_before_the_even_word_has_not_sealed",),
    ),
    Guard(
        "the even word before the end of the lease",
        "who gets the lease first after a seal finds the record sealed",
        "shmroute/writer.py",
        "self._words[record.slot] = record.generation",
        "self._leases.release(record.slot); self._words[record.slot] = record.generation",
        ("store/test_seal_order.py::test_who_comes_as_the_lease_ends_finds_the_record_sealed",),
    ),
    Guard(
        "a new generation for every record",
        "a ticket never opens a later record of its slot",
        "shmroute/writer.py",
        "self._next_generation += 2",
        "",
        ("store/test_space.py::test_a_slot_gets_a_new_generation_every_time",),
    ),
    Guard(
        "the exclusive lease of reclaiming",
        "a slot is not used again under a reader's lease",
        "shmroute/writer.py",
        "not self._leases.try_acquire(slot):",
        "False:",
        ("store/test_space.py::test_a_record_under_a_lease_is_not_used_again_even_when_released",),
    ),
    Guard(
        "the slot that is being unlocked",
        "the writer's threads, which share their leases, do not recycle a record in its seal",
        "shmroute/writer.py",
        "if slot in self._unlocking:",
        "if False:",
        (
            "store/test_threads.py::"
            "test_reclaiming_during_a_seal_takes_other_records_and_leaves_that_one",
        ),
    ),
    Guard(
        "the second look at the release, under the lease",
        "a record that came after reclaiming's scan is not taken for the released one",
        "shmroute/writer.py",
        "wanted = self._acknowledgements[slot] != self._words[slot]",
        "wanted = False",
        ("store/test_threads.py::test_a_reclaim_never_takes_a_record_that_came_after_its_scan",),
    ),
    Guard(
        "the second look at the age, under the lease",
        "a record that came after eviction's scan is not taken for the expired one",
        "shmroute/writer.py",
        "wanted = not self._expired(slot)",
        "wanted = False",
        ("store/test_threads.py::test_an_eviction_never_takes_a_record_that_came_after_its_scan",),
    ),
    Guard(
        "no seal after the arena was closed",
        "without its lease the slot may be read or punched out: its readers get WriterDied",
        "shmroute/writer.py",
        "        if self._closed:\n            # Without its lease",
        "        if False:\n            # Without its lease",
        ("store/test_deaths.py::test_a_record_in_flight_when_its_arena_closes_is_never_sealed",),
    ),
    Guard(
        "a rid taken from its older record",
        "a rid names its newest record, also after that was released",
        "shmroute/writer.py",
        "        self._forget(name)\n        self._slot_named.pop",
        "        self._slot_named.pop",
        ("store/test_newest.py::test_an_older_record_of_a_rid_does_not_come_up_again",),
    ),
    Guard(
        "a rid taken by an inline record",
        "a rid whose newest rows are in a response does not bring older ones",
        "shmroute/writer.py",
        "        self.forget_name(rid)\n        metadata =",
        "        metadata =",
        (
            "store/test_interruptions.py::"
            "test_a_newer_inline_record_takes_the_rid_from_an_older_one",
        ),
    ),
)

_READER = (
    Guard(
        "a batch's memory while somebody holds it",
        "no other batch is read into it",
        "shmroute/kept_memory.py",
        "    weakref.finalize(lent, _free.append, piece).atexit = False",
        "    _free.append(piece)",
        ("store/test_kept_memory.py::test_while_anything_of_it_is_held_it_is_not_given",),
    ),
    Guard(
        "the end of the other thread's copies",
        "no row is copied after its lease has ended",
        "shmroute/side_by_side.py",
        "                    error = self._wait()",
        "                    error = None",
        ("store/test_side_by_side.py::test_an_error_of_the_caller_s_gives_up_what_was_queued",),
    ),
    Guard(
        "the other thread's word heard again after an interruption",
        "a read that is interrupted as it ends does not wait for a thread that is no more",
        "shmroute/side_by_side.py",
        "return self._said[0]",
        "return self._said.pop()",
        (
            "store/test_side_by_side.py::"
            "test_what_interrupts_the_end_when_the_other_thread_has_said_its_word_is_raised",
        ),
    ),
    Guard(
        "the reader's lease",
        "rows do not change under whoever reads them",
        "shmroute/leases.py",
        "taken = _set_lock(fd, _SHARED[byte])",
        "taken = True",
        ("store/test_space.py::test_a_record_under_a_lease_is_not_used_again_even_when_released",),
    ),
    Guard(
        "the lease in every view",
        "rows stay what they are for as long as an array, slice or tensor shows them",
        "shmroute/views.py",
        "self._lease = lease",
        "self._lease = None",
        ("store/test_views.py::test_any_view_keeps_the_lease_after_the_reader_is_closed",),
    ),
    Guard(
        "the count of leases on one slot",
        "the end of one view takes no other view's lease",
        "shmroute/leases.py",
        "        if self._counts[slot]:\n            return False\n",
        "",
        ("store/test_leases.py::test_a_slot_that_was_leased_twice_ends_with_the_second_drop",),
    ),
    Guard(
        "a drop that queues while the leases are locked",
        "a view that the collector ends on the thread at work on the leases blocks nobody",
        "shmroute/leases.py",
        "while self._dropped and not self._lock.locked():",
        "while self._dropped:",
        ("store/test_leases.py::test_a_drop_does_not_wait_for_who_is_at_work_on_the_leases",),
    ),
    Guard(
        "the lease of a refused record given back",
        "what a reader refuses does not stay leased",
        "shmroute/opening.py",
        "held.drop_last()",
        "pass",
        ("store/test_leases.py::test_a_record_that_is_refused_leaves_those_opened_before_leased",),
    ),
    Guard(
        "the generation check",
        "a ticket opens its own record or none: released and recycled is RouteGone",
        "shmroute/opening.py",
        "if word != generation or int(",
        "if int(",
        (
            "store/test_space.py::"
            "test_an_evicted_record_is_route_gone_after_its_slot_holds_the_like",
        ),
    ),
    Guard(
        "the look at the release",
        "nobody opens a record that was released",
        "shmroute/opening.py",
        "if word != generation or int(memory.acknowledgements[slot]) == generation:",
        "if word != generation:",
        ("store/test_space.py::test_a_released_record_is_route_gone_by_ticket_and_by_rid",),
    ),
    Guard(
        "the bounds check of a slot's row",
        "a damaged row is a LayoutMismatch: nothing outside the record's extent is read",
        "shmroute/opening.py",
        "    _check_bounds(row, memory, slot)\n",
        "",
        ("store/test_foreign.py::test_a_record_that_points_outside_its_extent_is_not_followed",),
    ),
    Guard(
        "the bounds check of a ticket's slot",
        "a forged ticket is an InvalidTicket",
        "shmroute/opening.py",
        "if slot >= memory.description.slots:",
        "if False:",
        ("store/test_tickets.py::test_a_ticket_that_contradicts_its_record_is_refused",),
    ),
    Guard(
        "the full rid under the lease",
        "rids whose hashes collide are told apart",
        "shmroute/opening.py",
        "if metadata.rid != rid:",
        "if False:",
        ("store/test_search.py::test_colliding_rids_are_told_apart_by_the_full_rid",),
    ),
    Guard(
        "the ticket compared with its record",
        "a ticket that speaks of other rows than there are is an InvalidTicket",
        "shmroute/opening.py",
        "_check_ticket(ticket, row, memory.description.routes)",
        "pass",
        ("store/test_tickets.py::test_a_ticket_that_contradicts_its_record_is_refused",),
    ),
    Guard(
        "the demand for a complete record",
        "missing rows are IncompleteRoutes, unless the reader says that it masks them",
        "shmroute/opening.py",
        "self._check_complete(metadata, row.tokens)",
        "pass",
        ("store/test_round_trip.py::test_missing_ranges_are_merged_and_need_allow_missing",),
    ),
    Guard(
        "the node's boot id",
        "another node's ticket is NotOnThisNode, also where a segment of that name exists",
        "shmroute/opening.py",
        "if ticket.boot_id != segments.boot_id():",
        "if False:",
        ("store/test_tickets.py::test_a_ticket_of_another_node_names_that_node",),
    ),
    Guard(
        "the failure's own generation",
        "a released record is RouteGone, not RouteFailed with another record's reason",
        "shmroute/search.py",
        "if failure.generation == generation:\n        return RouteFailed",
        "if failure.generation:\n        return RouteFailed",
        (
            "store/test_space.py::"
            "test_a_released_record_has_not_the_failure_of_another_in_the_same_slot",
        ),
    ),
    Guard(
        "read-only views",
        "what is written into a view is a ValueError, not a segmentation fault",
        "shmroute/views.py",
        '"data": (self.address, True)',
        '"data": (self.address, False)',
        ("store/test_views.py::test_writing_through_a_view_raises",),
    ),
    Guard(
        "the checksum",
        "a byte that changed in memory is found by verify()",
        "shmroute/reader.py",
        "if found != self._row.checksum:",
        "if False:",
        ("store/test_round_trip.py::test_a_flipped_byte_is_found_by_the_checksum",),
    ),
    Guard(
        "the number of a ticket's fields",
        "a body that is no ticket's is an InvalidTicket",
        "shmroute/ticket.py",
        'if len(_typed(body, list, "body")) != _TICKET_FIELDS:',
        "if False:",
        ("store/test_tickets.py::test_a_body_that_is_no_ticket_s_is_refused",),
    ),
    Guard(
        "the pad of a ticket",
        "a client that still decodes int32 fails loudly instead of training on ticket bytes",
        "shmroute/ticket.py",
        "return envelope[: -len(_NO_PAD)] + _PAD",
        "pass",
        ("store/test_tickets.py::test_a_ticket_s_length_is_never_a_multiple_of_4",),
    ),
)

_FORKS = (
    Guard(
        "the fork hook of leases",
        "parent and child each keep their leases, whoever lets go first",
        "shmroute/leases.py",
        "os.register_at_fork(\n"
        "    before=_before_fork,\n"
        "    after_in_parent=_after_fork_in_parent,\n"
        "    after_in_child=_after_fork_in_child,\n"
        ")",
        "",
        (
            "store/test_forks.py::test_the_child_keeps_its_lease_when_the_parent_lets_go",
            "store/test_forks.py::test_the_parent_keeps_its_lease_when_the_child_is_done",
        ),
    ),
    Guard(
        "closing, not unlocking, in a child",
        "a child that ends its copies takes nothing from its parent",
        "shmroute/leases.py",
        "        for fd in self._fds.values():\n            os.close(fd)",
        "        for fd in self._fds.values():\n"
        "            lock_range(fd, fcntl.F_UNLCK, 0, SLOTS_PER_FILE)\n"
        "            os.close(fd)",
        ("store/test_forks.py::test_the_parent_keeps_its_lease_when_the_child_is_done",),
    ),
    Guard(
        "the open lease file closed in a child",
        "what a child locks and unlocks is not its parent's, though nobody had a lease at the fork",
        "shmroute/leases.py",
        "        self._resting = None\n        for fd in self._fds.values():",
        "        for fd in self._fds.values():",
        (
            "store/test_descriptors.py::test_the_lease_file_that_stays_open_is_not_a_child_s",
            "store/test_forks.py::"
            "test_a_child_of_a_fork_that_nobody_was_told_of_takes_no_lease_of_its_parent",
        ),
    ),
    Guard(
        "all leases in a child, told of the fork or not",
        "a handler's exception in a hook of fork lets no child unlock what its parent holds",
        "shmroute/leases.py",
        "    _forking.clear()\n    for leases in list(_every_shared):",
        "    for leases in _forking:",
        (
            "store/test_forks.py::"
            "test_a_child_of_a_fork_that_nobody_was_told_of_takes_no_lease_of_its_parent",
        ),
    ),
    Guard(
        "closing what was locked as a handler raised",
        "an interrupted opening keeps no slot from the writer",
        "shmroute/leases.py",
        "                self._close(index)\n            raise",
        "                self._rest(index)\n            raise",
        ("store/test_leases.py::test_a_lock_that_was_taken_as_a_handler_raised_is_not_kept",),
    ),
    Guard(
        "the fork hook of the writer",
        "a child of the writer cannot write, and does not outlive it as one",
        "shmroute/arena.py",
        "os.register_at_fork(after_in_child=_abandon_in_child)",
        "",
        ("store/test_forks.py::test_a_child_of_the_writer_cannot_write",),
    ),
    Guard(
        "every life lock closed in a child",
        "an arena whose writer died is reaped, though a child of the writer lives",
        "shmroute/arena.py",
        "    for fd in list(_life_fds):\n        _close_life(fd)\n",
        "",
        (
            "store/test_interruptions.py::"
            "test_a_child_closes_the_life_lock_of_an_arena_that_its_maker_forgot",
        ),
    ),
    Guard(
        "a new lock for a child's arenas",
        "a child does not wait for a thread that its parent has and it has not",
        "shmroute/attached.py",
        "os.register_at_fork(after_in_child=_new_lock_in_child)",
        "",
        (
            "store/test_interruptions.py::"
            "test_a_child_finds_arenas_that_another_thread_of_its_parent_was_looking_for",
        ),
    ),
)

_SEGMENTS = (
    Guard(
        "the life lock of a new arena",
        "an arena whose writer lives is not reaped",
        "shmroute/arena.py",
        "if lock_range(fd, fcntl.F_WRLCK, 0, 1) and",
        "if True and",
        ("store/test_deaths.py::test_a_live_writer_is_alive_and_a_killed_one_is_not",),
    ),
    Guard(
        "the creator's inode check",
        "a creator whose file the reaper removed before it was locked begins again",
        "shmroute/arena.py",
        "and segments.same_inode(fd, segment.data):",
        "and True:",
        ("store/test_reaping_races.py::test_a_creator_whose_new_file_was_reaped_begins_again",),
    ),
    Guard(
        "the temporary name of a new arena",
        "nobody attaches to half an arena",
        "shmroute/arena.py",
        "secrets.token_bytes(8), temporary=True)",
        "secrets.token_bytes(8))",
        ("store/test_deaths.py::test_half_an_arena_is_never_found",),
    ),
    Guard(
        "all memory taken at creation",
        "a full /dev/shm is an error at the start, not a SIGBUS later",
        "shmroute/segments.py",
        "os.posix_fallocate(fd, offset, piece)",
        "os.ftruncate(fd, offset + piece)",
        ("store/test_creation.py::test_memory_that_is_gone_when_it_is_taken_is_arena_too_small",),
    ),
    Guard(
        "files that everybody may write",
        "what an arena says is its owner's word",
        "shmroute/segments.py",
        "if status.st_mode & stat.S_IWOTH:",
        "if False:",
        ("store/test_attacks.py::test_a_file[data-that-everybody-may-write]",),
    ),
    Guard(
        "the row's generation against its word",
        "the row of another record is not taken for this one's",
        "shmroute/opening.py",
        "if row.generation != generation:",
        "if False:",
        ("store/test_attacks.py::test_a_record[generation-of-another-life]",),
    ),
    Guard(
        "the mode of new files",
        "files have mode 0600, whatever the umask",
        "shmroute/segments.py",
        "os.fchmod(shared.fd, mode)",
        "pass",
        ("store/test_creation.py::test_every_file_has_mode_0600_whatever_the_umask",),
    ),
    Guard(
        "exclusive creation",
        "a file that was there beforehand is not taken over",
        "shmroute/segments.py",
        "flags=posix_ipc.O_CREX",
        "flags=posix_ipc.O_CREAT",
        ("store/test_foreign.py::test_an_object_that_is_there_already_is_not_taken_over",),
    ),
    Guard(
        "no symbolic link",
        "a link in a segment's place is not followed",
        "shmroute/segments.py",
        " | os.O_NOFOLLOW",
        "",
        ("store/test_creation.py::test_a_symbolic_link_is_not_followed",),
    ),
    Guard(
        "the owner of a segment",
        "a file of another user than its name says is refused",
        "shmroute/segments.py",
        "if status.st_uid != owner:",
        "if False:",
        ("store/test_creation.py::test_a_segment_owned_by_another_user_is_refused",),
    ),
    Guard(
        "whose segments a search believes",
        "another user's file is no answer to a rid",
        "shmroute/attached.py",
        "    if segment.uid == os.geteuid():\n        return True",
        "    return True",
        ("store/test_foreign.py::test_a_search_does_not_believe_what_another_user_put_there",),
    ),
    Guard(
        "the layout version",
        "a segment of another release is a LayoutMismatch with the remedy",
        "shmroute/layout.py",
        "if version != LAYOUT_VERSION:",
        "if False:",
        ("store/test_creation.py::test_a_damaged_header_is_a_layout_mismatch",),
    ),
    Guard(
        "the capacity against the segment's size",
        "a segment that is too short is a LayoutMismatch, not a SIGBUS",
        "shmroute/layout.py",
        "if description.capacity > size:",
        "if False:",
        ("store/test_creation.py::test_a_short_copy_is_refused",),
    ),
    Guard(
        "the arena's id against its name",
        "a copy or a renamed segment is refused",
        "shmroute/memory.py",
        "if description.arena_id != segment.arena_id:",
        "if False:",
        ("store/test_creation.py::test_a_copy_under_another_id_is_refused",),
    ),
)

_REAPER = (
    Guard(
        "the reaper's life lock",
        "a living writer's arena is left alone, and of two reapers one works",
        "shmroute/reaper.py",
        "if not lock_range(fd, fcntl.F_WRLCK, 0, 1) or",
        "if",
        ("store/test_reaping_races.py::test_two_reapers_at_once_are_one",),
    ),
    Guard(
        "the reaper's inode check",
        "only the file that was locked is removed",
        "shmroute/reaper.py",
        " or not segments.same_inode(fd, segment.data):",
        ":",
        (
            "store/test_reaping_races.py::"
            "test_a_file_that_took_the_name_of_the_locked_one_is_left_alone",
        ),
    ),
    Guard(
        "the reaper's look at leases",
        "an arena is not removed under a reader, not even by force",
        "shmroute/reaper.py",
        'kept = "" if _lease_everything(memory, held) else "a reader has records open"',
        'kept = ""',
        ("store/test_deaths.py::test_not_even_force_removes_an_arena_under_a_lease",),
    ),
    Guard(
        "the reaper's look at unreleased records",
        "records that nobody released outlive their writer",
        "shmroute/reaper.py",
        'kept = kept or ("" if force else _unreleased(memory))',
        "pass",
        ("store/test_deaths.py::test_unreleased_records_keep_a_dead_arena",),
    ),
    Guard(
        "the lease of recycling in a dead arena",
        "a released record that somebody still reads is not punched out",
        "shmroute/reaper.py",
        "if leases.try_acquire(slot):",
        "leases.try_acquire(slot)\n            if True:",
        ("store/test_deaths.py::test_a_leased_and_released_record_outlives_reaping",),
    ),
    Guard(
        "words cleared before the heap is punched out",
        "who gets a lease after all reads nothing out of the hole",
        "shmroute/reaper.py",
        "            memory.words[:] = 0\n",
        "",
        (
            "store/test_reaping_races.py::"
            "test_a_reader_that_had_the_lease_file_open_reads_nothing_of_a_removed_arena",
        ),
    ),
    Guard(
        "the data segment removed last",
        "what a killed reaper left is found by the next one",
        "shmroute/reaper.py",
        "for name in (*leases, segment.control, segment.data):",
        "for name in (segment.data, *leases, segment.control):",
        (
            "store/test_deaths.py::"
            "test_a_reaper_killed_while_it_removes_leaves_what_the_next_one_finds",
        ),
    ),
)

_BRIDGE = (
    Guard(
        "the wait of the scatter for the last gather",
        "a location that is used again does not change a finished request's rows",
        "sglang_bridge/table.py",
        "        self.fence()\n        form =",
        "        form =",
        (
            "bridge/test_publisher.py::"
            "test_forwards_that_reuse_locations_at_once_never_reach_a_record",
        ),
    ),
    Guard(
        "the sealer's wait for the copy",
        "a record is not sealed before its rows are in memory",
        "sglang_bridge/publisher.py",
        "            gathered.wait()\n",
        "",
        ("bridge/test_publisher.py::test_a_record_is_not_sealed_before_its_rows_are_there",),
    ),
    Guard(
        "the snapshot of KV locations",
        "rows are gathered from where the request's own were, whatever its KV cache's release does",
        "sglang_bridge/gather_host.py",
        "req_to_token[slot, start:end].clone()",
        "req_to_token[slot, start:end]",
        ("bridge/test_publisher.py::test_a_snapshot_keeps_what_the_pool_s_row_held",),
    ),
    Guard(
        "the ticket before its response",
        "a finished request's response carries its ticket",
        "sglang_bridge/collect.py",
        "        publisher.issue()\n",
        "",
        (
            "bridge/test_collect.py::"
            "test_the_first_response_finds_its_ticket_and_the_step_s_others_have_theirs",
        ),
    ),
    Guard(
        "a session's prompt, copied at its request's end",
        "what the next turn does to it makes no row missing and no record fail",
        "sglang_bridge/finished.py",
        "            prompt = prompt[:]",
        "            pass",
        (
            "bridge/test_collect.py::"
            "test_a_session_s_next_turn_may_change_the_prompt_before_the_seal",
        ),
    ),
    Guard(
        "a packer of its own for each ticket, without msgpack's extension",
        "a ticket names its own record's slot",
        "shmroute/ticket.py",
        "packer.pack if alone else msgpack.packb",
        "packer.pack",
        (
            "store/test_tickets.py::"
            "test_tickets_of_several_threads_do_not_mix_with_a_msgpack_that_is_all_python",
        ),
    ),
    Guard(
        "what was noted, issued by whatever comes next",
        "a request whose response nobody made in its step is not lost, and keeps its rows",
        "sglang_bridge/publisher.py",
        "        if self._noted or self._described:\n            self.issue()\n",
        "",
        (
            "bridge/test_collect.py::"
            "test_what_no_response_has_asked_for_is_issued_by_what_comes_first",
        ),
    ),
    Guard(
        "a noted request leaves the queue",
        "a request has one ticket and is counted once",
        "sglang_bridge/publisher.py",
        "            request = described.popleft()\n            try:\n",
        "            request = described[issued]\n            try:\n",
        (
            "bridge/test_collect.py::"
            "test_a_request_whose_response_is_asked_for_again_keeps_its_one_ticket",
        ),
    ),
    Guard(
        "a record whose ticket cannot be handed over",
        "it is failed, and its readers do not wait for it",
        "sglang_bridge/publisher.py",
        '                record.fail("the engine could not issue its ticket")\n',
        "",
        (
            "bridge/test_collect.py::"
            "test_a_ticket_that_cannot_be_handed_over_fails_its_record_and_no_other",
        ),
    ),
    Guard(
        "no tickets for a step after a device error",
        "later requests go inline instead of failing after their tickets left",
        "sglang_bridge/publisher.py",
        "if self._broken or not",
        "if not",
        ("bridge/test_collect.py::test_after_a_device_error_a_whole_step_goes_inline",),
    ),
    Guard(
        "room for the whole step in the gatherer",
        "what it cannot take goes inline",
        "sglang_bridge/publisher.py",
        " or not self.gatherer.has_room(self._pending_bytes + nbytes):\n            return\n",
        ":\n            return\n",
        ("bridge/test_collect.py::test_what_of_a_step_the_gatherer_cannot_take_goes_inline",),
    ),
    Guard(
        "the tag check",
        "another token's row is missing, never wrong",
        "sglang_bridge/judge.py",
        "wrong = wrong_rows(tags, places)",
        "wrong = np.zeros(len(tags), dtype=bool)",
        (
            "bridge/test_publisher.py::"
            "test_rows_whose_location_was_taken_by_another_token_are_missing",
        ),
    ),
    Guard(
        "the token in the tag",
        "the row of another token at the same position is missing",
        "sglang_bridge/tags.py",
        "((tags & _PLACE_MASK) != places)",
        "((tags & _PLACE_MASK) >> POSITION_SHIFT != places >> POSITION_SHIFT)",
        ("bridge/test_tags.py::test_another_token_is_noticed",),
    ),
    Guard(
        "the position in the tag",
        "the row of the same token at another position is missing",
        "sglang_bridge/tags.py",
        "((tags & _PLACE_MASK) != places)",
        "((tags ^ places) & FOREIGN_TOKEN != 0)",
        ("bridge/test_tags.py::test_another_position_is_noticed",),
    ),
    Guard(
        "every tag in the short check",
        "a record is only taken to be all right where each row is",
        "sglang_bridge/tags.py",
        "return expected.tobytes() == tags.tobytes()",
        "return expected[:1].tobytes() == tags[:1].tobytes()",
        ("bridge/test_judge.py::test_another_token_s_row_is_missing_whatever_its_epoch",),
    ),
    Guard(
        "the epochs in the short check",
        "rows of several weights are told apart",
        "sglang_bridge/tags.py",
        "return expected.tobytes() == tags.tobytes()",
        "return places.tobytes() == (tags & _PLACE_MASK).tobytes()",
        ("bridge/test_judge.py::test_rows_that_all_fit_are_complete_and_have_their_epochs_runs",),
    ),
    Guard(
        "an idle scheduler thread that lets go",
        "records that finish together are not sealed milliseconds apart",
        "sglang_bridge/publisher.py",
        "        if self._settled != self._handed_over:\n            time.sleep(_IDLE_SLEEP)\n",
        "        pass\n",
        (
            "bridge/test_publisher.py::"
            "test_an_idle_scheduler_thread_sleeps_while_there_is_something_to_seal",
        ),
    ),
    Guard(
        "a paused scheduler thread that lets go",
        "what ended before a pause is sealed when nothing runs any more",
        "sglang_bridge/publisher.py",
        "        while self._settled != self._handed_over and time.monotonic() < end:\n",
        "        while False:\n",
        ("bridge/test_publisher.py::test_a_paused_scheduler_thread_waits_until_all_is_sealed",),
    ),
    Guard(
        "the hook on an idle scheduler",
        "an engine without it does not start",
        "sglang_bridge/scheduler.py",
        '    sites.hook(sites.IDLE, _idle, "BEFORE")\n',
        "",
        ("bridge/test_sites.py::test_all_hooks_of_a_scheduler_are_applied",),
    ),
    Guard(
        "negative ids are foreign ones",
        "a multimodal token's row is not missing",
        "sglang_bridge/tags.py",
        "tokens.view(np.uint64).max(initial=0) >= vocabulary",
        "tokens.max(initial=0) >= vocabulary",
        ("bridge/test_tags.py::test_ids_outside_the_vocabulary_share_one_code",),
    ),
    Guard(
        "pieces of a run",
        "no run has more pieces than its buffers have room for",
        "sglang_bridge/staging.py",
        " and len(run.pieces) < PIECES_MAX",
        "",
        ("bridge/test_staging.py::test_a_run_has_no_more_pieces_than_its_buffers",),
    ),
    Guard(
        "the weight epoch in the tag",
        "each row is told to come from the weights that computed it",
        "sglang_bridge/tags.py",
        "return tags | ((epoch & EPOCH_MASK) << EPOCH_SHIFT)",
        "return tags",
        ("bridge/test_publisher.py::test_the_runs_of_weight_versions_follow_the_rows",),
    ),
    Guard(
        "a new epoch with each update",
        "rows of older weights are not told to come from the newer",
        "sglang_bridge/epochs.py",
        "            self.current += 1\n",
        "",
        ("bridge/test_epochs.py::test_an_update_after_a_forward_begins_an_epoch",),
    ),
    Guard(
        "missing rows sealed as missing",
        "what the tags say reaches the reader",
        "sglang_bridge/publisher.py",
        "job.record.seal(missing=verdict.missing, ",
        "job.record.seal(",
        (
            "bridge/test_publisher.py::"
            "test_rows_whose_location_was_taken_by_another_token_are_missing",
        ),
    ),
    Guard(
        "the check of routed ids",
        "a row that no router can have chosen is missing",
        "sglang_bridge/table.py",
        "tags = torch.where(valid_rows(chosen, self.routes.num_experts), tags, INVALID)",
        "",
        (
            "bridge/test_table.py::"
            "test_a_row_that_no_router_can_have_chosen_is_missing_and_its_neighbours_are_not",
        ),
    ),
    Guard(
        "the capture buffer emptied after each scatter",
        "a layer that does not capture leaves missing rows, not the last forward's",
        "sglang_bridge/table.py",
        "captured.fill_(-1)",
        "",
        (
            "bridge/test_table.py::"
            "test_the_capture_buffer_keeps_no_routes_for_a_layer_that_does_not_capture_next_time",
        ),
    ),
    Guard(
        "a table that forgets with the KV cache",
        "after memory was given back no row passes for one that a forward wrote",
        "sglang_bridge/table.py",
        "        self.moves += 1\n        self.tags.fill_(INVALID)",
        "        self.moves += 1",
        (
            "bridge/test_table.py::"
            "test_memory_that_is_taken_again_is_as_large_and_every_row_is_invalid",
        ),
    ),
    Guard(
        "no ticket after a device error",
        "later requests go inline instead of failing after their tickets left",
        "sglang_bridge/publisher.py",
        "if self._broken:",
        "if False:",
        (
            "bridge/test_publisher.py::"
            "test_after_a_device_error_no_request_gets_a_ticket_that_would_fail",
        ),
    ),
    Guard(
        "an error of torch's is one of the device",
        "later requests go inline, whoever asked for what failed",
        "sglang_bridge/publisher.py",
        "isinstance(error, (DeviceError, torch.AcceleratorError))",
        "isinstance(error, DeviceError)",
        (
            "bridge/test_publisher.py::"
            "test_after_a_device_error_no_request_gets_a_ticket_that_would_fail",
        ),
    ),
    Guard(
        "an error of the driver's is one of the device",
        "as for torch's",
        "sglang_bridge/publisher.py",
        "isinstance(error, (DeviceError, torch.AcceleratorError))",
        "isinstance(error, torch.AcceleratorError)",
        (
            "bridge/test_publisher.py::"
            "test_after_a_device_error_no_request_gets_a_ticket_that_would_fail",
        ),
    ),
    Guard(
        "half of a device's memory for others",
        "a table by itself leaves SGLang room for its graphs and activations",
        "sglang_bridge/table.py",
        "needed > free // 2",
        "needed > free",
        (
            "bridge/test_table.py::"
            "test_its_rows_are_in_host_memory_where_half_is_not_enough_or_the_user_insists",
        ),
    ),
    Guard(
        "one owner among attention-TP ranks",
        "the others, which see the same tokens, make no arena and publish nothing",
        "sglang_bridge/capturer.py",
        " and parallel.attn_tp_rank == 0",
        "",
        (
            "bridge/test_capturer.py::"
            "test_of_two_attention_tp_ranks_the_first_alone_has_a_publisher_a_table_and_an_arena",
        ),
    ),
    Guard(
        "a forward whose routes were lost",
        "its KV locations do not keep a former occupant's rows",
        "sglang_bridge/capturer.py",
        '"hook_errors")\n            self._forget(captured)',
        '"hook_errors")',
        (
            "bridge/test_collect.py::"
            "test_a_forward_that_captured_too_few_rows_leaves_none_of_a_former_occupant",
        ),
    ),
    Guard(
        "views of the capture buffer that are as long as the forward",
        "a forward's rows are its own, whatever forward came before it",
        "sglang_bridge/layer_views.py",
        "        if count != self._count:\n",
        "        if not self._count:\n",
        (
            "bridge/test_layer_views.py::"
            "test_forwards_of_any_lengths_one_after_the_other_have_their_own_rows",
        ),
    ),
    Guard(
        "the capture buffer's length",
        "a forward longer than it ends as missing rows and does not end the engine",
        "sglang_bridge/capturer.py",
        "if unread or topk_indices.shape[0] > self.device_cache.buffer.shape[0]:",
        "if unread:",
        (
            "bridge/test_capturer.py::"
            "test_rows_of_a_forward_longer_than_the_capture_buffer_are_missing_and_it_is_named",
        ),
    ),
    Guard(
        "features that are refused",
        "an engine whose routes were not shown right does not start",
        "sglang_bridge/refused.py",
        "        if on:\n",
        "        if False:\n",
        (
            "bridge/test_refused.py::"
            "test_what_sglang_chose_by_itself_is_refused_like_what_the_user_gave",
        ),
    ),
    Guard(
        "the check of routed ids in the kernel",
        "the GPU's scatter declares the same rows missing",
        "sglang_bridge/kernels.py",
        "tl.where(faults > 0, INVALID_TAG, tag)",
        "tag",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "routes of layers that share memory, outside of graphs",
        "of two of which only one is left, neither is believed",
        "sglang_bridge/eager_forwards.py",
        "            if not outputs.apart():",
        "            if False:",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "memory that a layer shares with one that could not be kept",
        "of two of which only one is left, neither is believed",
        "sglang_bridge/router_outputs.py",
        "            self._beside.append(_span(ids))\n",
        "            pass\n",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "a forward of which only a part was kept",
        "what graphs or compiled code have written into the buffer is not overlooked",
        "sglang_bridge/eager_forwards.py",
        "return self._whole and self._outputs.complete and all(len(ids) >= tokens for ids in kept)",
        "return True",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "the wait of a forward's kernel for the last gather",
        "a location that is used again does not change a finished request's rows",
        "sglang_bridge/eager_forwards.py",
        "        self._table.fence()\n",
        "",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "the latest capture of a layer",
        "what an earlier one kept does not take its place",
        "sglang_bridge/router_outputs.py",
        "        self.kept.pop(place, None)\n",
        "",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "routers' tensors of the forward's own stream only",
        "no memory is read that another stream may give away",
        "sglang_bridge/eager_forwards.py",
        "            and self._stream(self._device) == self._forward\n",
        "",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
    Guard(
        "padding's routes cleared out of the capture buffer",
        "they are not taken for those of a layer that does not capture",
        "sglang_bridge/capturer.py",
        "            self._every_row[tokens:written].fill_(-1)\n",
        "            pass\n",
        (
            "bridge/test_capturer.py::"
            "test_what_padding_left_in_the_capture_buffer_is_gone_after_the_forward",
        ),
    ),
    Guard(
        "the capture buffer cleared of a forward whose end was not seen",
        "its routes are not taken for those of a layer that does not capture",
        "sglang_bridge/capturer.py",
        "            self._entry, self._dirty = None, True\n",
        "            self._entry = None\n",
        (
            "bridge/test_capturer.py::"
            "test_what_a_forward_left_whose_end_was_not_seen_is_gone_before_the_next",
        ),
    ),
    Guard(
        "models with zero experts",
        "ids that SGLang rewrites behind the router are not believed",
        "sglang_bridge/layers.py",
        'if getattr(config, "zero_expert_num", 0):',
        "if False:",
        ("bridge/test_layers.py::test_zero_experts_are_refused",),
    ),
    Guard(
        "routes kept inside a forward only",
        "what warms a graph up is not taken for a forward's, and the buffer is refilled after it",
        "sglang_bridge/capturer.py",
        "if eager is not None and self._entry is not None and eager.keep(layer_id, ids):",
        "if eager is not None and eager.keep(layer_id, ids):",
        ("bridge/test_capturer.py::test_outside_of_forwards_and_in_a_compiler_routes_are_copied",),
    ),
    Guard(
        "a decode graph told where the table is",
        "a graph writes into no memory that was given back",
        "sglang_bridge/decode_graphs.py",
        "        if now != self._told:",
        "        if self._told is None:",
        ("bridge/test_kernels.py::test_the_kernels_do_what_torch_does_in_every_case",),
    ),
)

_POPULATION = (
    Guard(
        "the end of the population before the arena's",
        "its memory goes when nobody enters its pages any more",
        "shmroute/arena.py",
        "            return\n        self.population.stop()\n",
        "            return\n",
        ("store/test_population.py::test_closing_ends_it_first_and_leaves_nothing",),
    ),
    Guard(
        "the clean-up of an arena whose population was interrupted",
        "no file and no life lock is left that nobody owns",
        "shmroute/arena.py",
        "            claim.give_up()\n",
        "",
        ("store/test_population.py::test_interrupted_there_creation_leaves_nothing",),
    ),
    Guard(
        "what a creation that is interrupted has claimed",
        "no file is left, wherever the interruption comes",
        "shmroute/arena.py",
        "        claim.segment = segment\n        try:\n",
        "        try:\n",
        ("store/test_interruptions.py::test_a_creation_leaves_nothing_wherever_it_is_interrupted",),
    ),
    Guard(
        "the look at a population's stop before each piece",
        "an engine that ends waits for a piece and not for all pages",
        "shmroute/population.py",
        "        while not self._stopped:",
        "        while True:",
        ("store/test_population.py::test_stopped_it_leaves_the_rest_and_what_was_to_follow",),
    ),
    Guard(
        "what follows a population that was stopped",
        "memory that is about to go is not page-locked",
        "shmroute/population.py",
        "if self._stopped or os.getpid() != self._pid:",
        "if os.getpid() != self._pid:",
        ("store/test_population.py::test_stopped_it_leaves_the_rest_and_what_was_to_follow",),
    ),
    Guard(
        "the populating thread does not wait for itself",
        "a finaliser that closes an arena there does not hang",
        "shmroute/population.py",
        "        if thread is threading.current_thread():\n            return False\n",
        "",
        (
            "store/test_population.py::"
            "test_stopped_by_the_thread_that_populates_it_waits_for_nothing",
        ),
    ),
    Guard(
        "the process that goes on after a population",
        "a fork page-locks nothing of its parent's",
        "shmroute/population.py",
        "if self._stopped or os.getpid() != self._pid:",
        "if self._stopped:",
        ("store/test_population.py::test_a_fork_goes_on_with_nothing_of_its_parent_s",),
    ),
    Guard(
        "the kernel without MADV_POPULATE_WRITE",
        "pages are entered there, too",
        "shmroute/population.py",
        "if number not in (errno.EINVAL, errno.EINTR):",
        "if number != errno.EINTR:",
        (
            "store/test_population.py::"
            "test_an_older_kernel_is_not_asked_again_and_every_page_is_read",
        ),
    ),
    Guard(
        "no population at the interpreter's end",
        "no thread is ended inside of a call",
        "shmroute/population.py",
        "                self._stopped = True\n            for",
        "                pass\n            for",
        ("store/test_population.py::test_begun_when_the_interpreter_ends_it_enters_nothing",),
    ),
    Guard(
        "the page lock whose start was interrupted",
        "nobody waits for ever for a thread that does not exist",
        "shmroute/pinned.py",
        "_start_thread()\n        except BaseException:\n            self._take_back()\n",
        "_start_thread()\n        except BaseException:\n",
        ("store/test_page_lock.py::test_interrupted_before_there_is_a_thread_it_can_begin_again",),
    ),
    Guard(
        "the thread of a page lock whose start was interrupted",
        "memory that is about to go is not page-locked",
        "shmroute/pinned.py",
        "            if self._state is not _State.LOCKING or self._locking_thread is not None:\n",
        "            if self._locking_thread is not None:\n",
        ("store/test_page_lock.py::test_a_thread_whose_start_was_interrupted_locks_nothing",),
    ),
    Guard(
        "the lock that the driver may have granted before an interruption",
        "no memory is unmapped under a lock",
        "shmroute/pinned.py",
        "            if self._asked:\n                self._unregister()\n",
        "",
        (
            "store/test_page_lock.py::"
            "test_interrupted_while_it_locks_it_takes_back_what_it_may_have_got",
        ),
    ),
    Guard(
        "the close of a page lock that a thread is at",
        "no memory is unmapped while it is being locked",
        "shmroute/pinned.py",
        "            if self._state is _State.LOCKING and self._locking_thread is not None:\n"
        "                return False\n",
        "",
        ("store/test_page_lock.py::test_closing_waits_for_the_thread_that_is_at_it",),
    ),
    Guard(
        "no page-locking at the interpreter's end",
        "no thread is ended inside the driver, which aborts the process",
        "shmroute/pinned.py",
        "            if not _ending:\n                return True\n",
        "            return True\n",
        ("store/test_page_lock.py::test_none_is_begun_when_the_interpreter_ends",),
    ),
)

_GPU = (
    Guard(
        "the wait of the scatter for the last gather, on streams",
        "a location that is used again does not change a finished request's rows",
        "sglang_bridge/gather_device.py",
        "        self._gathered.hold_back(stream)",
        "        pass",
        ("gpu/test_gatherer.py::test_locations_that_are_rewritten_at_once_never_reach_a_record",),
        gpu=True,
    ),
    Guard(
        "the wait of a decode graph for the last gather",
        "a graph's own scatter does not change a finished request's rows",
        "sglang_bridge/gather_device.py",
        "            self._hold_back_scatters(stream)",
        "            pass",
        ("gpu/test_gatherer.py::test_a_scatter_inside_a_graph_does_not_overtake_a_gather",),
        gpu=True,
    ),
    Guard(
        "a copy of the pool for one step",
        "a request's locations are those at its own end",
        "sglang_bridge/gather_device.py",
        "        self._new_step()  # the pool has been written to",
        "        pass",
        ("gpu/test_gatherer.py::test_a_copy_of_the_pool_is_of_its_step_only",),
        gpu=True,
    ),
    Guard(
        "the wait for the copy's event",
        "a record is not sealed before its rows are in memory",
        "sglang_bridge/gather_device.py",
        "self.buffer.copied.synchronize()",
        "pass",
        ("gpu/test_gatherer.py::test_a_record_is_not_sealed_before_its_copy_is_there",),
        gpu=True,
    ),
    Guard(
        "the copy behind its gather",
        "what is copied into the arena are the gathered rows",
        "sglang_bridge/gather_device.py",
        "self._gathered.hold_back(self._copy)",
        "pass",
        ("gpu/test_gatherer.py::test_locations_that_are_rewritten_at_once_never_reach_a_record",),
        gpu=True,
    ),
    Guard(
        "a lane that waits for its last copy",
        "the next rows in a lane do not reach the record before",
        "sglang_bridge/gather_device.py",
        "before.copied.hold_back(self._gather)",
        "pass",
        ("gpu/test_gatherer.py::test_a_lane_is_not_filled_again_before_its_copy_is_done",),
        gpu=True,
    ),
    Guard(
        "the schedule stream behind a snapshot",
        "a request's row of req_to_token is copied before SGLang rewrites it",
        "sglang_bridge/gather_device.py",
        "self._taken.hold_back(self._schedule)",
        "pass",
        ("gpu/test_gatherer.py::test_a_row_of_the_pool_is_not_rewritten_before_its_snapshot",),
        gpu=True,
    ),
    Guard(
        "the gather behind its snapshots",
        "rows are gathered by the request's own locations",
        "sglang_bridge/gather_device.py",
        "self._taken.hold_back(self._gather)",
        "pass",
        ("gpu/test_gatherer.py::test_a_gather_waits_for_a_snapshot_that_comes_late",),
        gpu=True,
    ),
    Guard(
        "a step's snapshots behind the last gather",
        "locations are not overwritten while rows are gathered by them",
        "sglang_bridge/gather_device.py",
        "self._gathered.hold_back(self._schedule)",
        "pass",
        ("gpu/test_gatherer.py::test_a_step_s_snapshots_wait_for_the_gather_of_the_step_before",),
        gpu=True,
    ),
    Guard(
        "layers' routes kept until they are read",
        "no later layer is given their memory, in a decode graph or outside",
        "sglang_bridge/router_outputs.py",
        "            self.kept[place] = ids\n",
        "            known = {'data_ptr': lambda _, at=ids.data_ptr(): at, "
        "'__len__': lambda _, n=len(ids): n, 'nbytes': 0}\n"
        "            self.kept[place] = type('Address', (), known)()\n",
        (
            "gpu/test_decode_graphs.py::test_replays_store_the_routes_of_their_own_step",
            "gpu/test_eager_forwards.py::"
            "test_forwards_that_are_launched_ahead_each_store_their_own_routes",
        ),
        gpu=True,
    ),
    Guard(
        "page-locked memory of its own for each forward's addresses",
        "a forward that is launched ahead does not change what one before it reads",
        "sglang_bridge/eager_forwards.py",
        "given = torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu)",
        "given = vars(self).setdefault('_one', torch.empty(len(numbers), dtype=torch.int64, "
        "pin_memory=on_gpu)).copy_(torch.tensor(numbers))",
        (
            "gpu/test_eager_forwards.py::"
            "test_forwards_that_are_launched_ahead_each_store_their_own_routes",
        ),
        gpu=True,
    ),
    Guard(
        "a trainer's lease until its copy is done",
        "rows do not change while the GPU reads them",
        "shmroute/inflight.py",
        "self.passed.synchronize()",
        "pass",
        ("gpu/test_trainer.py::test_the_lease_is_held_until_the_copy_is_done",),
        gpu=True,
    ),
    Guard(
        "unlocked before it is unmapped",
        "CUDA keeps no lock on memory that is something else's by then",
        "shmroute/attached.py",
        "            lock.close()",
        "            pass",
        (
            "gpu/test_pinned.py::"
            "test_a_trainer_s_heap_is_locked_beside_the_writer_s_and_unlocked_before_it_is_unmapped",
        ),
        gpu=True,
    ),
)

GUARDS = (*_BRIDGE, *_WRITER, *_READER, *_FORKS, *_SEGMENTS, *_REAPER, *_POPULATION, *_GPU)
